import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.CountDownLatch;
import org.redisson.Redisson;
import org.redisson.api.RBucket;
import org.redisson.api.RLock;
import org.redisson.api.RMap;
import org.redisson.api.RedissonClient;
import org.redisson.client.codec.StringCodec;
import org.redisson.config.Config;

/** Issues a coupon under Redisson's RLock: port, workers, seconds, prefix of the keys. Prints issued, seconds, p50, p99, p99.9, max (ms). */
public final class RedissonLock {
    public static void main(String[] args) throws Exception {
        int workers = Integer.parseInt(args[1]);
        double seconds = Double.parseDouble(args[2]);
        String prefix = args[3];
        Config config = new Config();
        config.setCodec(StringCodec.INSTANCE);
        config.useSingleServer().setAddress("redis://127.0.0.1:" + args[0]).setConnectionPoolSize(workers + 10);
        RedissonClient redisson = Redisson.create(config);
        List<Long> times = new ArrayList<>();
        CountDownLatch begin = new CountDownLatch(1);
        List<Thread> threads = new ArrayList<>();
        for (int w = 0; w < workers; w++) {
            String name = Integer.toString(w);
            Thread thread = new Thread(() -> work(redisson, prefix, name, begin, (long) (seconds * 1e9), times));
            thread.start();
            threads.add(thread);
        }
        // Connections and the compiler get a moment: the pool is filled before it counts.
        RLock warm = redisson.getLock(prefix + ":warm");
        for (int i = 0; i < 500; i++) {
            warm.lock();
            warm.unlock();
        }
        long began = System.nanoTime();
        begin.countDown();
        for (Thread thread : threads) {
            thread.join();
        }
        double took = (System.nanoTime() - began) / 1e9;
        times.sort(null);
        System.out.println(
                times.size() + " " + took + " " + at(times, 0.5) + " " + at(times, 0.99) + " " + at(times, 0.999) + " " + at(times, 1));
        System.exit(0);
    }

    private static void work(RedissonClient redisson, String prefix, String name, CountDownLatch begin, long nanos, List<Long> times) {
        RLock lock = redisson.getLock(prefix + ":lock");
        RBucket<String> issued = redisson.getBucket(prefix + ":issued");
        RMap<String, String> users = redisson.getMap(prefix + ":users");
        try {
            begin.await();
        } catch (InterruptedException e) {
            return;
        }
        long until = System.nanoTime() + nanos;
        for (int number = 0; System.nanoTime() < until; number++) {
            long started = System.nanoTime();
            lock.lock();
            try {
                String before = issued.get();
                long serial = before == null ? 1 : Long.parseLong(before) + 1;
                if (serial <= 1_000_000_000L) {
                    var set = issued.setAsync(Long.toString(serial));
                    users.fastPutAsync(name + "-" + number, Long.toString(serial)).toCompletableFuture().join();
                    set.toCompletableFuture().join();
                }
            } finally {
                lock.unlock();
            }
            synchronized (times) {
                times.add(System.nanoTime() - started);
            }
        }
    }

    private static double at(List<Long> times, double part) {
        return times.isEmpty() ? 0 : times.get(Math.min((int) (times.size() * part), times.size() - 1)) / 1e6;
    }
}

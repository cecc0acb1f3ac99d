import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicLong;
import org.redisson.Redisson;
import org.redisson.api.RFencedLock;
import org.redisson.api.RLock;
import org.redisson.api.RedissonClient;
import org.redisson.client.codec.StringCodec;
import org.redisson.config.Config;

/**
 * Redisson on the Redis behind Holdfast. "race": port, file, name, threads, total: adds to a number in a file under one lock, see
 * ../locks/race.py. "wake": port, name, threads: prints how many ms after each release the next one had the lock, see
 * ../locks/wake.py. "follow": port: does what each line of its input says, and answers with a line.
 */
public final class RedissonLocks {
    public static void main(String[] args) throws Exception {
        Config config = new Config();
        config.setCodec(StringCodec.INSTANCE);
        // Renewed each second, so that a test need not wait long to see it.
        config.setLockWatchdogTimeout(3_000);
        config.useSingleServer().setAddress("redis://127.0.0.1:" + args[1]);
        RedissonClient redisson = Redisson.create(config);
        // Redisson's own threads would keep a program alive whose main thread has ended by an exception.
        try {
            switch (args[0]) {
                case "race" -> race(redisson, Path.of(args[2]), args[3], Integer.parseInt(args[4]), Integer.parseInt(args[5]));
                case "wake" -> wake(redisson, args[2], Integer.parseInt(args[3]));
                default -> follow(redisson);
            }
        } catch (Throwable e) {
            end(e);
        }
        System.exit(0);
    }

    private static void end(Throwable e) {
        e.printStackTrace();
        System.exit(1);
    }

    private static void race(RedissonClient redisson, Path file, String name, int count, int total) throws Exception {
        RLock warm = redisson.getLock(name + ":warm");
        for (int i = 0; i < 500; i++) {
            warm.lock();
            warm.unlock();
        }
        CountDownLatch begin = new CountDownLatch(1);
        AtomicInteger added = new AtomicInteger();
        Thread[] threads = new Thread[count];
        for (int t = 0; t < count; t++) {
            threads[t] = new Thread(() -> {
                try {
                    RLock lock = redisson.getLock(name);
                    begin.await();
                    for (boolean more = true; more;) {
                        lock.lock();
                        try {
                            more = add(file, total);
                        } finally {
                            lock.unlock();
                        }
                        if (more) {
                            added.incrementAndGet();
                        }
                    }
                } catch (Throwable e) {
                    end(e);
                }
            });
            threads[t].start();
        }
        System.out.println("ready");
        System.in.read();
        begin.countDown();
        for (Thread thread : threads) {
            thread.join();
        }
        System.out.println(added.get());
    }

    private static void wake(RedissonClient redisson, String name, int count) throws Exception {
        RLock lock = redisson.getLock(name);
        for (int i = 0; i < 2_000; i++) {
            lock.lock();
            lock.unlock();
        }
        double[] waits = new double[count];
        AtomicInteger served = new AtomicInteger();
        AtomicLong released = new AtomicLong();
        CountDownLatch ready = new CountDownLatch(count);
        Thread[] threads = new Thread[count];
        lock.lock();
        for (int t = 0; t < count; t++) {
            threads[t] = new Thread(null, () -> {
                try {
                    ready.countDown();
                    lock.lock(1, TimeUnit.MINUTES);
                    waits[served.getAndIncrement()] = (System.nanoTime() - released.get()) / 1e6;
                    released.set(System.nanoTime());
                    lock.unlock();
                } catch (Throwable e) {
                    end(e);
                }
            }, "waiter", 256 * 1024);
            threads[t].start();
        }
        ready.await();
        // Until all of them wait.
        Thread.sleep(1_000 + count);
        released.set(System.nanoTime());
        lock.unlock();
        for (Thread thread : threads) {
            thread.join();
        }
        for (double wait : waits) {
            System.out.println(wait);
        }
    }

    private static boolean add(Path file, int total) throws Exception {
        int number = Integer.parseInt(Files.readString(file).trim());
        if (number >= total) {
            return false;
        }
        Files.writeString(file, Integer.toString(number + 1));
        return true;
    }

    private static void follow(RedissonClient redisson) throws Exception {
        System.out.println("ready");
        BufferedReader lines = new BufferedReader(new InputStreamReader(System.in));
        for (String line = lines.readLine(); line != null; line = lines.readLine()) {
            String[] words = line.split(" ");
            String name = words[1];
            RLock lock = redisson.getLock(name);
            RFencedLock fenced = redisson.getFencedLock(name);
            System.out.println(switch (words[0]) {
                case "lock" -> {
                    lock.lock();
                    yield "locked";
                }
                case "lease" -> {
                    lock.lock(Long.parseLong(words[2]), TimeUnit.MILLISECONDS);
                    yield "locked";
                }
                case "try" -> String.valueOf(lock.tryLock());
                case "unlock" -> {
                    lock.unlock();
                    yield "unlocked";
                }
                case "count" -> String.valueOf(lock.getHoldCount());
                case "islocked" -> String.valueOf(lock.isLocked());
                case "fenced" -> String.valueOf(fenced.lockAndGetToken());
                case "token" -> String.valueOf(fenced.getToken());
                case "force" -> String.valueOf(lock.forceUnlock());
                default -> "what?";
            });
        }
    }
}

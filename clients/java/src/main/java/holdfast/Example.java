package holdfast;

import java.util.List;
import java.util.UUID;
import java.util.stream.Stream;
import redis.clients.jedis.JedisPool;
import redis.clients.jedis.exceptions.JedisConnectionException;
import redis.clients.jedis.exceptions.JedisDataException;
import redis.clients.jedis.util.SafeEncoder;

/** Holdfast from Java, with Jedis: after {@code make run}. */
public final class Example {
    private Example() {}

    /**
     * Sends a change and returns its reply, whose element 0 is the outcome. Every try carries the same REQUEST, so that there is one effect at
     * most.
     */
    static List<?> change(JedisPool pool, String command, String... arguments) {
        String[] words = Stream.concat(Stream.of(arguments), Stream.of("REQUEST", UUID.randomUUID().toString())).toArray(String[]::new);
        RuntimeException last = null;
        for (int attempt = 0; attempt < 5; attempt++) {
            try (var jedis = pool.getResource()) {
                return (List<?>) jedis.sendCommand(() -> SafeEncoder.encode(command), words);
            } catch (JedisConnectionException lost) {
                last = lost;
            } catch (JedisDataException refused) {
                if (!refused.getMessage().matches("(?s)(LOADING|TRYAGAIN|INDOUBT) .*")) {
                    throw refused;
                }
                last = refused;
            }
        }
        throw new IllegalStateException(command + " was not answered: ask again with REQUEST " + words[words.length - 1], last);
    }

    private static String outcome(List<?> reply) {
        return SafeEncoder.encode((byte[]) reply.get(0));
    }

    static void run(String host, int port) {
        try (var pool = new JedisPool(host, port)) {
            change(pool, "STOCK.SET", "java-mug", "10");
            List<?> sold = change(pool, "STOCK.DECR", "java-mug", "3");
            System.out.println(outcome(sold) + " " + sold.get(1));
            // A refusal is a reply, not an error.
            List<?> refusal = change(pool, "STOCK.DECR", "java-mug", "8");
            System.out.println(outcome(refusal));
            if (!outcome(sold).equals("OK") || !sold.get(1).equals(7L) || !outcome(refusal).equals("INSUFFICIENT")) {
                throw new AssertionError(sold + " " + refusal);
            }
        }
    }

    public static void main(String[] arguments) {
        run("127.0.0.1", arguments.length > 0 ? Integer.parseInt(arguments[0]) : 6380);
    }
}

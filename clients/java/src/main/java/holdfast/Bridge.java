package holdfast;

import io.lettuce.core.ClientOptions;
import io.lettuce.core.RedisClient;
import io.lettuce.core.RedisCommandExecutionException;
import io.lettuce.core.RedisFuture;
import io.lettuce.core.RedisURI;
import io.lettuce.core.StaticCredentialsProvider;
import io.lettuce.core.api.StatefulRedisConnection;
import io.lettuce.core.codec.StringCodec;
import io.lettuce.core.output.CommandOutput;
import io.lettuce.core.protocol.CommandArgs;
import io.lettuce.core.protocol.ProtocolKeyword;
import io.lettuce.core.protocol.ProtocolVersion;
import io.lettuce.core.pubsub.RedisPubSubAdapter;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;
import java.util.logging.Level;
import java.util.logging.Logger;
import java.util.regex.Pattern;
import java.util.stream.Stream;
import org.redisson.Redisson;
import org.redisson.api.RFuture;
import org.redisson.client.RedisException;
import org.redisson.client.protocol.RedisCommand;
import org.redisson.client.protocol.decoder.ObjectListReplayDecoder;
import org.redisson.command.CommandAsyncExecutor;
import org.redisson.command.CommandBatchService;
import org.redisson.config.Config;
import org.redisson.config.Protocol;
import redis.clients.jedis.DefaultJedisClientConfig;
import redis.clients.jedis.JedisPool;
import redis.clients.jedis.JedisPubSub;
import redis.clients.jedis.Jedis;
import redis.clients.jedis.RedisProtocol;
import redis.clients.jedis.commands.ProtocolCommand;
import redis.clients.jedis.exceptions.JedisDataException;
import redis.clients.jedis.exceptions.JedisException;
import redis.clients.jedis.util.KeyValue;

/**
 * A client for the tests: each line of the standard input is a command, its words in hexadecimal digits, and its reply is printed as JSON.
 * {@code pipeline N} sends N reads in one go, {@code pool N} asks on N connections at once, {@code subscribe channel} subscribes and prints the
 * first message.
 *
 * <p>Arguments: {@code jedis}, {@code lettuce} or {@code redisson}, the port, and the protocol, 2 or 3, or 0 for what the client does by itself.
 * It logs in as {@code $CLIENT_USER}, if there is one.
 */
public final class Bridge {
    private interface Client {
        /** The reply as the client has it; an error as {@link Refused}. */
        Object send(List<byte[]> words);

        boolean pipeline(int depth) throws Exception;

        boolean pool(int size) throws Exception;

        String subscribe(String channel) throws Exception;
    }

    private static final int PATIENCE_S = 60;
    private static final String USER = System.getenv("CLIENT_USER");
    private static final String PASSWORD = System.getenv("CLIENT_PASSWORD");
    private static final Pattern SAID = Pattern.compile("[A-Z]+ ");

    private record Refused(String text) {}

    private record Lost(String why) {}

    private Bridge() {}

    public static void main(String[] arguments) throws Exception {
        // It logs each connection that is lost, which is what these tests do.
        Logger lettuce = Logger.getLogger("io.lettuce");
        lettuce.setLevel(Level.SEVERE);
        int port = Integer.parseInt(arguments[1]);
        int protocol = Integer.parseInt(arguments[2]);
        Client client = null;
        Object refused = null;
        try {
            client =
                    switch (arguments[0]) {
                        case "jedis" -> new OfJedis(port, protocol);
                        case "lettuce" -> new OfLettuce(port, protocol);
                        default -> new OfRedisson(port, protocol);
                    };
        } catch (RuntimeException error) {
            // It is not let in: that is the answer to whatever is asked.
            refused = refusal(error);
        }
        var input = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.US_ASCII));
        for (String line = input.readLine(); line != null; line = input.readLine()) {
            String[] words = line.split(" ");
            Object reply =
                    client == null ? refused : switch (words[0]) {
                        case "pipeline" -> client.pipeline(Integer.parseInt(words[1]));
                        case "pool" -> client.pool(Integer.parseInt(words[1]));
                        case "subscribe" -> client.subscribe(words[1]);
                        default -> {
                            var bytes = new ArrayList<byte[]>();
                            for (String word : words) {
                                bytes.add(word.equals(".") ? new byte[0] : HexFormat.of().parseHex(word));
                            }
                            yield client.send(bytes);
                        }
                    };
            var out = new StringBuilder();
            write(reply, out);
            System.out.write((out + "\n").getBytes(StandardCharsets.UTF_8));
            System.out.flush();
        }
        System.exit(0);
    }

    /** What the server has said, where an error is for that. */
    private static Object refusal(Throwable error) {
        for (Throwable at = error; at != null; at = at.getCause()) {
            boolean isReply = at instanceof JedisDataException || at instanceof RedisCommandExecutionException || at instanceof RedisException;
            if (isReply && SAID.matcher(at.getMessage()).lookingAt()) {
                return new Refused(at.getMessage());
            }
        }
        return new Lost(String.valueOf(error));
    }

    private static void write(Object reply, StringBuilder out) {
        if (reply == null || reply instanceof Long || reply instanceof Boolean) {
            out.append(reply);
        } else if (reply instanceof Refused refused) {
            write(Map.of("error", refused.text()), out);
        } else if (reply instanceof Lost lost) {
            write(Map.of("lost", lost.why()), out);
        } else if (reply instanceof byte[] bytes) {
            text(new String(bytes, StandardCharsets.UTF_8), out);
        } else if (reply instanceof Map<?, ?> map) {
            out.append('{');
            String comma = "";
            for (var entry : map.entrySet()) {
                out.append(comma);
                comma = ",";
                write(entry.getKey(), out);
                out.append(':');
                write(entry.getValue(), out);
            }
            out.append('}');
        } else if (reply instanceof Iterable<?> items) {
            var pairs = new LinkedHashMap<Object, Object>();
            var list = new ArrayList<Object>();
            for (Object item : items) {
                if (item instanceof KeyValue<?, ?> pair) {
                    pairs.put(pair.getKey(), pair.getValue());
                } else {
                    list.add(item);
                }
            }
            if (!pairs.isEmpty()) {
                write(pairs, out);
                return;
            }
            out.append('[');
            for (int at = 0; at < list.size(); at++) {
                out.append(at > 0 ? "," : "");
                write(list.get(at), out);
            }
            out.append(']');
        } else {
            text(reply.toString(), out);
        }
    }

    private static void text(String text, StringBuilder out) {
        out.append('"');
        for (char c : text.toCharArray()) {
            switch (c) {
                case '"', '\\' -> out.append('\\').append(c);
                default -> out.append(c < 0x20 ? String.format("\\u%04x", (int) c) : String.valueOf(c));
            }
        }
        out.append('"');
    }

    private static final class OfJedis implements Client {
        private final redis.clients.jedis.RedisClient jedis;
        private final int port;

        OfJedis(int port, int protocol) {
            this.port = port;
            var config = DefaultJedisClientConfig.builder();
            if (protocol > 0) {
                config.protocol(protocol == 3 ? RedisProtocol.RESP3 : RedisProtocol.RESP2);
            }
            if (USER != null) {
                config.user(USER).password(PASSWORD);
            }
            jedis = redis.clients.jedis.RedisClient.builder().hostAndPort("127.0.0.1", port).clientConfig(config.build()).build();
        }

        @Override
        public Object send(List<byte[]> words) {
            ProtocolCommand name = () -> words.get(0);
            try {
                return jedis.sendCommand(name, words.subList(1, words.size()).toArray(byte[][]::new));
            } catch (JedisException error) {
                return refusal(error);
            }
        }

        @Override
        public boolean pipeline(int depth) {
            ProtocolCommand get = () -> "STOCK.GET".getBytes(StandardCharsets.UTF_8);
            try (var pipeline = jedis.pipelined()) {
                var replies = new ArrayList<redis.clients.jedis.Response<Object>>();
                for (int at = 0; at < depth; at++) {
                    replies.add(pipeline.sendCommand(get, "java-mug"));
                }
                pipeline.sync();
                return replies.stream().allMatch(reply -> reply.get() instanceof Long);
            }
        }

        @Override
        public boolean pool(int size) throws Exception {
            var config = new org.apache.commons.pool2.impl.GenericObjectPoolConfig<Jedis>();
            config.setMaxTotal(size);
            try (var pool = new JedisPool(config, "127.0.0.1", port)) {
                var all = new ArrayList<Jedis>();
                for (int at = 0; at < size; at++) {
                    all.add(pool.getResource());
                }
                ProtocolCommand get = () -> "STOCK.GET".getBytes(StandardCharsets.UTF_8);
                boolean good = all.stream().allMatch(one -> one.sendCommand(get, "java-mug") instanceof Long);
                all.forEach(Jedis::close);
                return good;
            }
        }

        @Override
        public String subscribe(String channel) {
            var heard = new String[1];
            var listener =
                    new JedisPubSub() {
                        @Override
                        public void onMessage(String name, String message) {
                            heard[0] = message;
                            unsubscribe();
                        }
                    };
            try (var one = new Jedis("127.0.0.1", port)) {
                one.subscribe(listener, channel);
            }
            return heard[0];
        }
    }

    /** A reply of whatever shape; Lettuce's own outputs are each for one. */
    private static final class Tree extends CommandOutput<String, String, Object> {
        private record Open(List<Object> items, int expected, boolean isMap) {
            Object closed() {
                if (!isMap) {
                    return items;
                }
                var map = new LinkedHashMap<Object, Object>();
                for (int at = 0; at < items.size(); at += 2) {
                    map.put(items.get(at), items.get(at + 1));
                }
                return map;
            }
        }

        private final ArrayDeque<Open> open = new ArrayDeque<>();

        Tree() {
            super(StringCodec.UTF8, null);
        }

        private void add(Object value) {
            while (true) {
                Open parent = open.peek();
                if (parent == null) {
                    output = value;
                    return;
                }
                parent.items().add(value);
                if (parent.items().size() < parent.expected()) {
                    return;
                }
                value = open.pop().closed();
            }
        }

        private void begin(int expected, boolean isMap) {
            if (expected < 0) {
                add(null);
            } else if (expected == 0) {
                add(new Open(List.of(), 0, isMap).closed());
            } else {
                open.push(new Open(new ArrayList<>(), expected, isMap));
            }
        }

        @Override
        public void set(ByteBuffer bytes) {
            add(bytes == null ? null : StandardCharsets.UTF_8.decode(bytes).toString());
        }

        @Override
        public void setSingle(ByteBuffer bytes) {
            set(bytes);
        }

        @Override
        public void set(long number) {
            add(number);
        }

        @Override
        public void set(boolean isSo) {
            add(isSo);
        }

        @Override
        public void multi(int count) {
            begin(count, false);
        }

        @Override
        public void multiArray(int count) {
            begin(count, false);
        }

        @Override
        public void multiSet(int count) {
            begin(count, false);
        }

        @Override
        public void multiMap(int count) {
            begin(count * 2, true);
        }
    }

    private static final class OfLettuce implements Client {
        private final RedisClient client;
        private final StatefulRedisConnection<String, String> connection;

        OfLettuce(int port, int protocol) {
            RedisURI address = RedisURI.create("127.0.0.1", port);
            if (USER != null) {
                address.setCredentialsProvider(new StaticCredentialsProvider(USER, PASSWORD.toCharArray()));
            }
            client = RedisClient.create(address);
            if (protocol > 0) {
                var version = protocol == 3 ? ProtocolVersion.RESP3 : ProtocolVersion.RESP2;
                client.setOptions(ClientOptions.builder().protocolVersion(version).build());
            }
            connection = client.connect();
        }

        private static RedisFuture<Object> dispatch(StatefulRedisConnection<String, String> on, List<byte[]> words) {
            ProtocolKeyword name =
                    new ProtocolKeyword() {
                        @Override
                        public byte[] getBytes() {
                            return words.get(0);
                        }

                        @Override
                        public String toString() {
                            return new String(words.get(0), StandardCharsets.UTF_8);
                        }
                    };
            var arguments = new CommandArgs<>(StringCodec.UTF8);
            words.subList(1, words.size()).forEach(arguments::add);
            return on.async().dispatch(name, new Tree(), arguments);
        }

        private static Object reply(RedisFuture<Object> future) {
            try {
                return future.get(PATIENCE_S, TimeUnit.SECONDS);
            } catch (Exception error) {
                return refusal(error);
            }
        }

        private static List<byte[]> get() {
            return List.of("STOCK.GET".getBytes(StandardCharsets.UTF_8), "java-mug".getBytes(StandardCharsets.UTF_8));
        }

        @Override
        public Object send(List<byte[]> words) {
            return reply(dispatch(connection, words));
        }

        @Override
        public boolean pipeline(int depth) {
            var replies = new ArrayList<RedisFuture<Object>>();
            for (int at = 0; at < depth; at++) {
                replies.add(dispatch(connection, get()));
            }
            return replies.stream().allMatch(reply -> reply(reply) instanceof Long);
        }

        @Override
        public boolean pool(int size) {
            var all = new ArrayList<StatefulRedisConnection<String, String>>();
            for (int at = 0; at < size; at++) {
                all.add(client.connect());
            }
            boolean good = all.stream().map(one -> dispatch(one, get())).toList().stream().allMatch(one -> reply(one) instanceof Long);
            all.forEach(StatefulRedisConnection::close);
            return good;
        }

        @Override
        public String subscribe(String channel) throws Exception {
            var heard = new CompletableFuture<String>();
            try (var subscription = client.connectPubSub()) {
                subscription.addListener(
                        new RedisPubSubAdapter<>() {
                            @Override
                            public void message(String name, String message) {
                                heard.complete(message);
                            }
                        });
                subscription.async().subscribe(channel).get(PATIENCE_S, TimeUnit.SECONDS);
                String message = heard.get(PATIENCE_S, TimeUnit.SECONDS);
                subscription.async().unsubscribe(channel).get(PATIENCE_S, TimeUnit.SECONDS);
                return message;
            }
        }
    }

    /** Redisson has no method for a command that it does not know; this is what its own objects send theirs with. */
    private static final class OfRedisson implements Client {
        private final Redisson redisson;

        OfRedisson(int port, int protocol) {
            var config = new Config();
            if (protocol > 0) {
                config.setProtocol(protocol == 3 ? Protocol.RESP3 : Protocol.RESP2);
            }
            if (USER != null) {
                config.setUsername(USER).setPassword(PASSWORD);
            }
            config.useSingleServer().setAddress("redis://127.0.0.1:" + port);
            redisson = (Redisson) Redisson.create(config);
        }

        private static RFuture<Object> send(CommandAsyncExecutor executor, String name, Object... arguments) {
            return executor.writeAsync("", org.redisson.client.codec.StringCodec.INSTANCE, new RedisCommand<>(name, new ObjectListReplayDecoder<>()), arguments);
        }

        private static Object reply(RFuture<Object> future) {
            try {
                return future.get(PATIENCE_S, TimeUnit.SECONDS);
            } catch (Exception error) {
                return refusal(error);
            }
        }

        @Override
        public Object send(List<byte[]> words) {
            String name = new String(words.get(0), StandardCharsets.UTF_8);
            return reply(send(redisson.getCommandExecutor(), name, words.subList(1, words.size()).toArray()));
        }

        @Override
        public boolean pipeline(int depth) {
            var batch = new CommandBatchService(redisson.getCommandExecutor());
            for (int at = 0; at < depth; at++) {
                send(batch, "STOCK.GET", "java-mug");
            }
            List<?> replies = batch.execute().getResponses();
            return replies.size() == depth && replies.stream().allMatch(reply -> reply instanceof Long);
        }

        @Override
        public boolean pool(int size) {
            // It has as many connections as there are commands under way, up to 64.
            return Stream.generate(() -> send(redisson.getCommandExecutor(), "STOCK.GET", "java-mug"))
                    .limit(size)
                    .toList()
                    .stream()
                    .allMatch(one -> reply(one) instanceof Long);
        }

        @Override
        public String subscribe(String channel) throws Exception {
            var heard = new CompletableFuture<String>();
            var topic = redisson.getTopic(channel, org.redisson.client.codec.StringCodec.INSTANCE);
            topic.addListener(String.class, (name, message) -> heard.complete(message));
            String message = heard.get(PATIENCE_S, TimeUnit.SECONDS);
            topic.removeAllListeners();
            return message;
        }
    }
}

// Consumes outcomes of cancellations: java Consume.java DIRECTORY
import com.rabbitmq.client.Channel;
import com.rabbitmq.client.ConnectionFactory;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Map;

class Consume {
    // snippet
    /** Keeps each outcome once, however often it is delivered. This client connects again by itself. */
    static void consume(Channel channel, String prefix, Path directory) throws IOException {
        Map<String, Object> quorum = Map.of("x-queue-type", "quorum");
        channel.queueDeclare("orders.outcomes", true, false, false, quorum); // true: durable
        channel.queueBind("orders.outcomes", prefix + ".outcomes", "cancellation.*");
        channel.basicQos(100);
        channel.basicConsume("orders.outcomes", false, (tag, delivery) -> {
            // Written under its id, so twice is once. In a database: INSERT … ON CONFLICT DO NOTHING, before the ack.
            Files.write(directory.resolve(delivery.getProperties().getMessageId()), delivery.getBody());
            channel.basicAck(delivery.getEnvelope().getDeliveryTag(), false);
        }, tag -> { });
    }
    // end

    public static void main(String[] arguments) throws Exception {
        var factory = new ConnectionFactory();
        factory.setUri(System.getenv("AMQP_URL"));
        var prefix = System.getenv().getOrDefault("AMQP_PREFIX", "qris.expire");
        try {
            consume(factory.newConnection().createChannel(), prefix, Path.of(arguments[0]));
        } catch (Exception error) {
            System.err.println("cannot consume: " + (error.getCause() == null ? error : error.getCause()));
            System.exit(1);
        }
    }
}

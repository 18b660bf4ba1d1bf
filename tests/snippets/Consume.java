// Consumes outcomes of cancellations, and connects again after any error: java Consume.java DIRECTORY
import com.rabbitmq.client.Channel;
import com.rabbitmq.client.ConnectionFactory;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Map;
import java.util.concurrent.CountDownLatch;

class Consume {
    // snippet
    /** Keeps each outcome once, however often it is delivered. {@code ended} tells that the channel is no more. */
    static void consume(Channel channel, String prefix, Path directory, CountDownLatch ended) throws IOException {
        Map<String, Object> quorum = Map.of("x-queue-type", "quorum");
        channel.addShutdownListener(cause -> ended.countDown());
        channel.queueDeclare("orders.outcomes", true, false, false, quorum); // true: durable
        channel.queueBind("orders.outcomes", prefix + ".outcomes", "cancellation.*");
        channel.basicQos(100);
        channel.basicConsume("orders.outcomes", false, (tag, delivery) -> {
            // Written under its id, so twice is once. In a database: INSERT … ON CONFLICT DO NOTHING, before the ack.
            Files.write(directory.resolve(delivery.getProperties().getMessageId()), delivery.getBody());
            channel.basicAck(delivery.getEnvelope().getDeliveryTag(), false);
        }, tag -> ended.countDown()); // the broker cancelled the consumer: was the queue deleted?
    }
    // end

    public static void main(String[] arguments) throws Exception {
        var factory = new ConnectionFactory();
        factory.setUri(System.getenv("AMQP_URL"));
        factory.setAutomaticRecoveryEnabled(false); // it would not bring back a queue that was deleted
        var prefix = System.getenv().getOrDefault("AMQP_PREFIX", "qris.expire");
        for (;; Thread.sleep(2000)) {
            var ended = new CountDownLatch(1);
            try (var connection = factory.newConnection()) {
                consume(connection.createChannel(), prefix, Path.of(arguments[0]), ended);
                ended.await();
                System.err.println("not consuming: the connection, the channel or the queue has gone");
            } catch (Exception error) {
                System.err.println("not consuming: " + (error.getCause() == null ? error : error.getCause()));
            }
        }
    }
}

// Publishes one command: java Publish.java BILL MERCHANT ORDER
import com.rabbitmq.client.AMQP;
import com.rabbitmq.client.Channel;
import com.rabbitmq.client.Connection;
import com.rabbitmq.client.ConnectionFactory;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.util.Date;
import java.util.concurrent.atomic.AtomicBoolean;

class Publish {
    // snippet
    /** Returns once the broker has the command. After any exception, call it again with the same arguments. */
    static void publish(Channel channel, String prefix, String bill, String merchant, String order) throws Exception {
        var returned = new AtomicBoolean(); // mandatory: set before the confirm if the queue is missing
        channel.addReturnListener(message -> returned.set(true));
        channel.confirmSelect();
        // With names that may hold quotes: your JSON library.
        String body = "{\"billnumber\": \"%s\", \"additionalInfo\": {\"merchantId\": \"%s\"}, \"reference\": \"%s\"}"
            .formatted(bill, merchant, order);
        var properties = new AMQP.BasicProperties.Builder().messageId("cancel-" + order + "-" + bill).deliveryMode(2)
            .contentType("application/json").timestamp(new Date()).build();
        byte[] bytes = body.getBytes(StandardCharsets.UTF_8);
        channel.basicPublish(prefix + ".commands", "cancellation", true, properties, bytes); // true: mandatory
        channel.waitForConfirmsOrDie(10_000);
        if (returned.get()) {
            throw new IOException("no queue took the command; is the topology declared?");
        }
    }
    // end

    public static void main(String[] arguments) throws Exception {
        var factory = new ConnectionFactory();
        factory.setUri(System.getenv("AMQP_URL"));
        try (Connection connection = factory.newConnection(); Channel channel = connection.createChannel()) {
            var prefix = System.getenv().getOrDefault("AMQP_PREFIX", "qris.expire");
            publish(channel, prefix, arguments[0], arguments[1], arguments[2]);
        } catch (Exception error) { // also a missing exchange and a lost connection
            System.err.println("not confirmed: " + error);
            System.exit(1);
        }
    }
}

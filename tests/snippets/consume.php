<?php // php consume.php DIRECTORY: keeps each outcome of a cancellation once, however often it is delivered.
// After any error it connects again: what was not acknowledged comes again. (php-amqplib)
require 'vendor/autoload.php';
use PhpAmqpLib\Connection\AMQPStreamConnection;
use PhpAmqpLib\Wire\AMQPTable;

$url = parse_url(getenv('AMQP_URL'));
$vhost = urldecode(substr($url['path'] ?? '/%2F', 1));
$exchange = (getenv('AMQP_PREFIX') ?: 'qris.expire') . '.outcomes';
for (;; sleep(2)) {
    try {
        $connection = new AMQPStreamConnection($url['host'], $url['port'] ?? 5672, $url['user'], $url['pass'], $vhost);
        $channel = $connection->channel();
        $quorum = new AMQPTable(['x-queue-type' => 'quorum']);
        $channel->queue_declare('orders.outcomes', false, true, false, false, false, $quorum); // true: durable
        $channel->queue_bind('orders.outcomes', $exchange, 'cancellation.*');
        $channel->basic_qos(0, 100, false);
        $channel->basic_consume('orders.outcomes', '', false, false, false, false, function ($message) use ($argv) {
            // Written under its id, so twice is once. In a database: INSERT … ON CONFLICT DO NOTHING, before the ack.
            $kept = file_put_contents($argv[1] . '/' . $message->get('message_id'), $message->getBody());
            if ($kept === false) throw new Exception('the outcome cannot be written');
            $message->ack();
        });
        $channel->consume(); // returns when the broker cancels the consumer, as when the queue was deleted
        $connection->close();
        fwrite(STDERR, "not consuming: the broker cancelled the consumer\n");
    } catch (Throwable $error) {
        fwrite(STDERR, "not consuming: {$error->getMessage()}\n");
    }
}

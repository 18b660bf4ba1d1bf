<?php // php publish.php BILL MERCHANT ORDER: ends with 0 once the broker has the command. (php-amqplib)
require 'vendor/autoload.php';
use PhpAmqpLib\Connection\AMQPStreamConnection;
use PhpAmqpLib\Message\AMQPMessage;

[, $bill, $merchant, $order] = $argv;
$url = parse_url(getenv('AMQP_URL'));
$vhost = urldecode(substr($url['path'] ?? '/%2F', 1));
$exchange = (getenv('AMQP_PREFIX') ?: 'qris.expire') . '.commands';
$body = json_encode(['billnumber' => $bill, 'additionalInfo' => ['merchantId' => $merchant], 'reference' => $order]);
try {
    $connection = new AMQPStreamConnection($url['host'], $url['port'] ?? 5672, $url['user'], $url['pass'], $vhost);
    $channel = $connection->channel();
    $channel->confirm_select();
    $channel->set_nack_handler(fn () => throw new Exception('the broker refused it'));
    $channel->set_return_listener(fn () => throw new Exception('no queue took the command; is the topology declared?'));
    $channel->basic_publish(new AMQPMessage($body, [
        'message_id' => "cancel-$order-$bill", 'delivery_mode' => AMQPMessage::DELIVERY_MODE_PERSISTENT,
        'content_type' => 'application/json', 'timestamp' => time(),
    ]), $exchange, 'cancellation', true); // true: mandatory
    $channel->wait_for_pending_acks_returns(10);
    $connection->close();
} catch (Throwable $error) { // also a missing exchange and a lost connection: run it again, the message_id is the same
    fwrite(STDERR, "not confirmed: {$error->getMessage()}\n");
    exit(1);
}

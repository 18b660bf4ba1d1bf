// Publishes one command: go run publish.go BILL MERCHANT ORDER
package main

import (
	"context"
	"encoding/json"
	"errors"
	"log"
	"os"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// snippet
// publish returns nil once the broker has the command. After any error, call it again with the same arguments.
func publish(ctx context.Context, channel *amqp.Channel, prefix, bill, merchant, order string) error {
	body, _ := json.Marshal(map[string]any{
		"billnumber": bill, "additionalInfo": map[string]string{"merchantId": merchant}, "reference": order})
	returned := channel.NotifyReturn(make(chan amqp.Return, 1)) // filled before the confirm if the queue is missing
	confirmed, err := channel.PublishWithDeferredConfirmWithContext(
		ctx, prefix+".commands", "cancellation", true, false, // true: mandatory
		amqp.Publishing{MessageId: "cancel-" + order + "-" + bill, DeliveryMode: amqp.Persistent,
			ContentType: "application/json", Timestamp: time.Now(), Body: body})
	if err != nil {
		return err
	}
	if !confirmed.Wait() { // the channel is in confirm mode: channel.Confirm(false)
		return errors.New("the broker did not confirm it: refused, no such exchange, or the connection was lost")
	}
	if len(returned) > 0 {
		return errors.New("no queue took the command; is the topology declared?")
	}
	return nil
}

// end

func main() {
	connection, err := amqp.Dial(os.Getenv("AMQP_URL"))
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	channel, err := connection.Channel()
	if err == nil {
		err = channel.Confirm(false)
	}
	if err == nil {
		prefix := os.Getenv("AMQP_PREFIX")
		if prefix == "" {
			prefix = "qris.expire"
		}
		err = publish(context.Background(), channel, prefix, os.Args[1], os.Args[2], os.Args[3])
	}
	if err != nil {
		log.Fatal(err)
	}
}

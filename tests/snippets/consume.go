// Consumes outcomes of cancellations: go run consume.go DIRECTORY
package main

import (
	"log"
	"os"
	"path/filepath"

	amqp "github.com/rabbitmq/amqp091-go"
)

// snippet
// consume keeps each outcome of a queue once, however often it is delivered. It returns when the connection is lost:
// connect and call it again; what was not acknowledged comes again.
func consume(channel *amqp.Channel, directory string) error {
	deliveries, err := channel.Consume("orders.outcomes", "", false, false, false, false, nil)
	if err != nil {
		return err
	}
	for delivery := range deliveries {
		// Written under its id, so twice is once. In a database: INSERT … ON CONFLICT DO NOTHING, before the ack.
		if err := os.WriteFile(filepath.Join(directory, delivery.MessageId), delivery.Body, 0o644); err != nil {
			return err
		}
		if err := delivery.Ack(false); err != nil {
			return err
		}
	}
	return amqp.ErrClosed
}

// end

// bind makes the queue, durable and replicated, and asks for the outcomes of cancellations.
func bind(channel *amqp.Channel, prefix string) error {
	quorum := amqp.Table{"x-queue-type": "quorum"}
	if _, err := channel.QueueDeclare("orders.outcomes", true, false, false, false, quorum); err != nil {
		return err
	}
	if err := channel.QueueBind("orders.outcomes", "cancellation.*", prefix+".outcomes", false, nil); err != nil {
		return err
	}
	return channel.Qos(100, 0, false)
}

func main() {
	connection, err := amqp.Dial(os.Getenv("AMQP_URL"))
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	channel, err := connection.Channel()
	if err == nil {
		prefix := os.Getenv("AMQP_PREFIX")
		if prefix == "" {
			prefix = "qris.expire"
		}
		err = bind(channel, prefix)
	}
	if err == nil {
		err = consume(channel, os.Args[1])
	}
	log.Fatal(err)
}

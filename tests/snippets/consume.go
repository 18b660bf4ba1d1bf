// Consumes outcomes of cancellations, and connects again after any error: go run consume.go DIRECTORY
package main

import (
	"log"
	"os"
	"path/filepath"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// snippet
// consume keeps each outcome of a queue once, however often it is delivered. When it returns, the
// connection is lost; main connects and calls it again, and what was not acknowledged comes again.
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
	for ; ; time.Sleep(2 * time.Second) {
		log.Printf("not consuming: %v", run(os.Args[1]))
	}
}

// run consumes until the connection is lost, or until the broker cancels the consumer because the queue was deleted.
func run(directory string) error {
	connection, err := amqp.Dial(os.Getenv("AMQP_URL"))
	if err != nil {
		return err
	}
	defer connection.Close()
	prefix := os.Getenv("AMQP_PREFIX")
	if prefix == "" {
		prefix = "qris.expire"
	}
	channel, err := connection.Channel()
	if err != nil {
		return err
	}
	if err := bind(channel, prefix); err != nil {
		return err
	}
	return consume(channel, directory)
}

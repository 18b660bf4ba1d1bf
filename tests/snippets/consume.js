// node consume.js DIRECTORY: keeps each outcome of a cancellation once, however often it is delivered. Start it again
// when it ends: it ends with an error when the connection is lost, and what was not acknowledged comes again.
const amqp = require("amqplib");
const fs = require("fs");
const path = require("path");

function end(error) {
  console.error(`the connection to the broker ended: ${error ? error.message : "closed"}`);
  process.exit(1);
}

async function consume(directory) {
  const connection = await amqp.connect(process.env.AMQP_URL);
  connection.on("error", end).on("close", end);
  const channel = await connection.createChannel();
  channel.on("error", end).on("close", end);
  const exchange = `${process.env.AMQP_PREFIX || "qris.expire"}.outcomes`;
  await channel.assertQueue("orders.outcomes", { durable: true, arguments: { "x-queue-type": "quorum" } });
  await channel.bindQueue("orders.outcomes", exchange, "cancellation.*");
  await channel.prefetch(100);
  await channel.consume("orders.outcomes", (message) => {
    if (message === null) return end(new Error("the broker cancelled the consumer: was the queue deleted?"));
    // Written under its id, so twice is once. In a database: INSERT … ON CONFLICT DO NOTHING, before the ack.
    fs.writeFileSync(path.join(directory, message.properties.messageId), message.content);
    channel.ack(message);
  });
}

consume(process.argv[2]).catch(end);

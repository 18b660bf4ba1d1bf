// node consume.js DIRECTORY: outcomes of cancellations, each once, however often it is delivered.
const amqp = require("amqplib");
const fs = require("fs");
const path = require("path");

async function consume(directory) {
  const connection = await amqp.connect(process.env.AMQP_URL);
  const channel = await connection.createChannel();
  await channel.assertQueue("orders.outcomes", { durable: true, arguments: { "x-queue-type": "quorum" } });
  await channel.bindQueue("orders.outcomes", "qris.expire.outcomes", "cancellation.*");
  await channel.prefetch(100);
  await channel.consume("orders.outcomes", (message) => {
    // Written under its id, so twice is once. In a database: INSERT … ON CONFLICT DO NOTHING, before the ack.
    fs.writeFileSync(path.join(directory, message.properties.messageId), message.content);
    channel.ack(message);
  });
}

consume(process.argv[2]);

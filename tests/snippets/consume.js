// node consume.js DIRECTORY: keeps each outcome of a cancellation once, however often it is delivered. After any error
// it connects again: what was not acknowledged comes again.
const amqp = require("amqplib");
const fs = require("fs");
const path = require("path");
const exchange = `${process.env.AMQP_PREFIX || "qris.expire"}.outcomes`;

async function consume(channel, directory) {
  await channel.assertQueue("orders.outcomes", { durable: true, arguments: { "x-queue-type": "quorum" } });
  await channel.bindQueue("orders.outcomes", exchange, "cancellation.*");
  await channel.prefetch(100);
  await channel.consume("orders.outcomes", (message) => {
    if (message === null) return channel.close(); // the broker cancelled the consumer: was the queue deleted?
    // Written under its id, so twice is once. In a database: INSERT … ON CONFLICT DO NOTHING, before the ack.
    fs.writeFileSync(path.join(directory, message.properties.messageId), message.content);
    channel.ack(message);
  });
}

async function connect(directory) {
  const connection = await amqp.connect(process.env.AMQP_URL);
  const ended = (it) => new Promise((_, fail) => it.on("error", fail).on("close", () => fail(Error("it was closed"))));
  const work = connection.createChannel().then((it) => Promise.all([ended(it), consume(it, directory)]));
  await Promise.all([ended(connection), work]).finally(() => connection.close().catch(() => {}));
}

async function again(error) {
  if (error) console.error(`not consuming: ${error.message}`);
  setTimeout(() => connect(process.argv[2]).catch(again), error ? 2000 : 0);
}
again();

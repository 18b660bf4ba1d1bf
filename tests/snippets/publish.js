// node publish.js BILL MERCHANT ORDER: ends with 0 once the broker has the command safely. (npm install amqplib)
const amqp = require("amqplib");

async function publish([bill, merchant, order]) {
  const connection = await amqp.connect(process.env.AMQP_URL);
  const channel = await connection.createConfirmChannel();
  let returned = false;
  channel.on("return", () => { returned = true; }); // mandatory: comes before the confirm if the queue is missing
  const body = { billnumber: bill, additionalInfo: { merchantId: merchant }, reference: order };
  channel.publish("qris.expire.commands", "cancellation", Buffer.from(JSON.stringify(body)), {
    messageId: `cancel-${order}`, persistent: true, mandatory: true,
    contentType: "application/json", timestamp: Math.floor(Date.now() / 1000),
  });
  await channel.waitForConfirms();
  await connection.close();
  if (returned) throw new Error("no queue took it; is the topology declared?");
}

publish(process.argv.slice(2)).catch((error) => { console.error(error.message); process.exit(1); }); // then again

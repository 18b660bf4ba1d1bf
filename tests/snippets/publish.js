// node publish.js BILL MERCHANT ORDER: ends with 0 once the broker has the command. (npm install amqplib)
const amqp = require("amqplib");

async function publish([bill, merchant, order]) {
  const connection = await amqp.connect(process.env.AMQP_URL);
  const channel = await connection.createConfirmChannel();
  let returned = false;
  channel.on("return", () => { returned = true; }); // mandatory: comes before the confirm if no queue is bound
  // Without listeners for "error", a missing exchange or a lost connection would end the process with a stack trace.
  const failed = new Promise((_, reject) => {
    channel.on("error", reject);
    connection.on("error", reject);
    connection.on("close", (error) => reject(error || new Error("the connection ended before the confirm")));
  });
  const body = { billnumber: bill, additionalInfo: { merchantId: merchant }, reference: order };
  const exchange = `${process.env.AMQP_PREFIX || "qris.expire"}.commands`;
  channel.publish(exchange, "cancellation", Buffer.from(JSON.stringify(body)), {
    messageId: `cancel-${order}-${bill}`, persistent: true, mandatory: true,
    contentType: "application/json", timestamp: Math.floor(Date.now() / 1000),
  });
  await Promise.race([channel.waitForConfirms(), failed]);
  failed.catch(() => {}); // closing is no failure any more
  await connection.close();
  if (returned) throw new Error("no queue took the command; is the topology declared?");
}

publish(process.argv.slice(2)).catch((error) => { // run it again: the same command has the same messageId
  console.error(`not confirmed: ${error.message}`);
  process.exit(1);
});

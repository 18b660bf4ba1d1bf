// A worker for Node.js, tuned by hand: amqplib and undici, bounded concurrency, pipelined confirms, acks in batches.
import crypto from 'node:crypto';
import fs from 'node:fs';
import amqp from 'amqplib';
import { Pool } from 'undici';

const E = process.env;
const BASE = new URL(E.GATEWAY_BASE_URL), QUEUE = `${E.AMQP_PREFIX}.sweep`, EXCHANGE = `${E.AMQP_PREFIX}.outcomes`;
const CONCURRENCY = +E.WORKER_CONCURRENCY, PREFETCH = Math.max(32, CONCURRENCY * 2);
const CLIENT = E.GATEWAY_CLIENT_ID, CHANNEL = E.GATEWAY_CHANNEL_ID, SECRET = E.GATEWAY_CLIENT_SECRET;
const PATH = '/qr/qr-mpm-expire-billnumber', ATTEMPTS = 4, TIMEOUT = 20_000;

const key = crypto.createSecretKey(Buffer.from(SECRET));
const prefix = String(crypto.randomInt(1e10)).padStart(10, '0');
let serial = 0;
const externalId = () => prefix + String(++serial).padStart(12, '0');
const timestamp = () => new Date(Date.now() + 7 * 3600e3).toISOString().slice(0, 23) + '+07:00';
const sleep = (ms) => new Promise((go) => setTimeout(go, ms));

const pool = new Pool(BASE.origin, { connections: CONCURRENCY, pipelining: 1, headersTimeout: TIMEOUT, bodyTimeout: TIMEOUT, connect: { timeout: TIMEOUT } });

/** The dispatch API: no stream, no AbortController for each call. -> [status, text] */
const post = (path, headers, body) => new Promise((resolve, reject) => {
  let status = 0, text = '';
  pool.dispatch({ path, method: 'POST', headers, body }, {
    onConnect() {},
    onHeaders(code) { status = code; return true; },
    onData(chunk) { text += chunk.latin1Slice(); return true; },
    onComplete() { resolve([status, text]); },
    onError: reject,
  });
});

let token = '', till = 0, asking = null;
const getToken = () => {
  if (token && Date.now() < till) return token;
  return (asking ??= (async () => {
    const ts = timestamp();
    const sign = crypto.sign('RSA-SHA256', Buffer.from(`${CLIENT}|${ts}`), fs.readFileSync(E.GATEWAY_PRIVATE_KEY_FILE)).toString('base64');
    const [, text] = await post(`${BASE.pathname}/access-token/b2b`, ['content-type', 'application/json', 'x-timestamp', ts, 'x-client-key', CLIENT,
      'x-signature', sign], '{"grantType":"client_credentials"}');
    const d = JSON.parse(text);
    till = Date.now() + (+d.expiresIn - 30) * 1000;
    return (token = d.accessToken);
  })().finally(() => { asking = null; }));
};

async function expire(id, raw) {
  const cmd = JSON.parse(raw);
  const bill = cmd.billnumber;
  if (!bill || !cmd.additionalInfo.merchantId) throw new Error('bad message');
  const body = JSON.stringify(cmd);
  const digest = crypto.hash('sha256', body, 'hex');
  let ok = false, status = 0, code = '', xid = '', attempt = 0;
  while (attempt < ATTEMPTS) {
    attempt++;
    status = 0; code = 'network';
    try {
      const tok = token && Date.now() < till ? token : await getToken();
      xid = externalId();
      const ts = timestamp();
      const sign = crypto.createHmac('sha512', key).update(`POST:${PATH}:${tok}:${digest}:${ts}`).digest('base64');
      const [s, text] = await post(BASE.pathname + PATH, ['content-type', 'application/json', 'authorization', 'Bearer ' + tok, 'x-timestamp', ts, 'x-signature', sign,
        'x-partner-id', CLIENT, 'x-external-id', xid, 'channel-id', CHANNEL, 'x-channel-id', CHANNEL], body);
      status = s;
      try { code = JSON.parse(text).responseCode ?? ''; } catch { code = ''; }
      if (status === 200) { ok = true; break; }
      if (status === 401) { if (token === tok) token = ''; continue; }
      if (status < 500 && status !== 429) break;
    } catch { /* network: again */ }
    await sleep(20 * 2 ** attempt);
  }
  const result = ok ? 'expired' : 'unresolved';
  const made = crypto.hash('sha1', `${id}\n${result}`, 'hex').slice(0, 32);
  return [`sweep.${result}`, made, JSON.stringify({ outcomeId: made, commandId: id, billnumber: bill, status: result, responseCode: code,
    attempts: attempt, externalId: xid, completedAt: timestamp() })];
}

const die = (why) => { console.error(why); process.exit(1); };
const conn = await amqp.connect(E.AMQP_URL, { noDelay: true });
conn.on('error', die);
const ch = await conn.createConfirmChannel();
ch.on('error', die);
ch.on('return', () => die('returned')); // comes before its confirm: nothing returned is ever acked
await ch.prefetch(PREFETCH);

const OPTIONS = { persistent: true, mandatory: true, contentType: 'application/json' };
const done = new Set();
let low = 1, scheduled = false;
function flush() {
  scheduled = false;
  const start = low;
  while (done.delete(low)) low++;
  if (low > start) ch.ack({ fields: { deliveryTag: low - 1 } }, true);
}

let busy = 0;
const waiting = [];
async function take(m) {
  busy++;
  const tag = m.fields.deliveryTag;
  try {
    const id = m.properties.messageId;
    const [rk, messageId, out] = await expire(id, m.content.toString());
    ch.publish(EXCHANGE, rk, Buffer.from(out), { ...OPTIONS, messageId, correlationId: id }, (err) => {
      if (err) die(err);
      done.add(tag);
      if (!scheduled && tag === low) { scheduled = true; setImmediate(flush); }
    });
  } catch (e) {
    console.error(e);
    ch.reject(m, false);
  }
  busy--;
  if (waiting.length > head) next();
}
let head = 0;
function next() {
  const m = waiting[head];
  waiting[head++] = undefined;
  if (head > 1024) { waiting.splice(0, head); head = 0; }
  take(m);
}
await ch.consume(QUEUE, (m) => { if (m === null) die('cancelled'); if (busy < CONCURRENCY) take(m); else waiting.push(m); });
for (const s of ['SIGTERM', 'SIGINT']) process.on(s, async () => { await conn.close(); await pool.destroy(); process.exit(0); });

// Publishes readings with MQTT.js and says what was acknowledged; subscribes and says what came.
//
// usage: mqttjs_client.mjs HOST PORT USERNAME PASSWORD CLIENT_ID {311|5} {publish|subscribe} TOPIC COUNT
// With TRANSPORT=websockets it comes in at /mqtt, with TRANSPORT=tls it trusts the authority in CA_FILE. Prints one JSON object
// a line.

import { readFileSync } from "node:fs";

import mqtt from "mqtt";

const [host, port, username, password, clientId, version, action, topic, count] = process.argv.slice(2);
const say = (fact) => console.log(JSON.stringify(fact));

const carriers = {
  tcp: { url: `mqtt://${host}:${port}` },
  tls: { url: `mqtts://${host}:${port}`, ca: process.env.CA_FILE && readFileSync(process.env.CA_FILE) },
  websockets: { url: `ws://${host}:${port}/mqtt` },
};
const { url, ca } = carriers[process.env.TRANSPORT ?? "tcp"];

const client = await mqtt.connectAsync(url, {
  ca,
  username,
  password,
  clientId,
  protocolVersion: version === "5" ? 5 : 4,
  reconnectPeriod: 0,
});

if (action === "publish") {
  for (let seq = 0; seq < Number(count); seq += 1) {
    const reading = { ts: 1763692212000 + seq, seq, values: { t: seq } };
    await client.publishAsync(topic, JSON.stringify(reading), { qos: 1 });
    say({ acknowledged: seq });
  }
} else {
  let left = Number(count);
  const enough = new Promise((resolve) => {
    client.on("message", (name, payload, packet) => {
      say({ topic: name, payload: payload.toString(), qos: packet.qos });
      left -= 1;
      if (left === 0) resolve();
    });
  });
  const granted = await client.subscribeAsync(topic, { qos: 1 });
  say({ granted: granted.map((grant) => grant.qos) });
  await enough;
}
await client.endAsync();

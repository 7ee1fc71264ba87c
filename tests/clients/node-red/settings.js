// Node-RED without an editor: it runs the flows of its user directory, and takes their secrets from the environment.
module.exports = {
  flowFile: "flows.json",
  credentialSecret: false,
  mqttReconnectTime: 1000,
  httpAdminRoot: false,
  httpNodeRoot: false,
  telemetry: { enabled: false, updateNotification: false },
  externalModules: { palette: { allowInstall: false }, modules: { allowInstall: false } },
  logging: { console: { level: "info", metrics: false, audit: false } },
};

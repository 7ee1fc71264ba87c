//! A server that scenarios are played against: mosquitto, the oracle, or Muster.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::LazyLock;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::{TcpStream, UnixStream};
use tokio::process::{Child, Command};
use tokio::time::Instant;

use crate::harness::client::{Client, Socket};
use crate::harness::packet::{ConnAck, Connect};
use crate::harness::raw::Version;
use crate::harness::{Fleet, PATIENCE};

/// A running server of its own for one scenario.
pub(super) struct Target {
    server: Server,
    /// User name and password of somebody who may use every topic but `test/nosubscribe`.
    login: Option<(String, String)>,
}

enum Server {
    Mosquitto { _process: Box<Child>, directory: tempfile::TempDir },
    Muster(Box<Fleet>),
}

impl Target {
    /// mosquitto on a Unix socket, so that no port is fought for; `settings` are lines of its configuration.
    pub(super) async fn mosquitto(settings: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name).display().to_string();
        std::fs::write(path("rules.json"), NO_SUBSCRIBE.to_string()).expect("the directory can be written");
        let own = [
            format!("listener 0 {}", path(SOCKET)),
            "allow_anonymous true".to_owned(),
            "user root".to_owned(),
            format!("plugin {}", dynamic_security().display()),
            format!("plugin_opt_config_file {}", path("rules.json")),
        ];
        let conf = format!("{}\n{}\n", own.join("\n"), settings.join("\n"));
        std::fs::write(path("mosquitto.conf"), conf).expect("the directory can be written");
        let process = Command::new("mosquitto")
            .args(["-c", &path("mosquitto.conf")])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("`make setup` installs mosquitto");
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(path(SOCKET)).await.is_err() {
            assert!(Instant::now() < deadline, "mosquitto listens in time");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Self { server: Server::Mosquitto { _process: Box::new(process), directory }, login: None }
    }

    /// Muster with some settings of its own.
    pub(super) async fn muster(settings: &[(&str, &str)]) -> Self {
        let fleet = Fleet::start_with(settings).await;
        let login = Some(fleet.platform_user().await);
        Self { server: Server::Muster(Box::new(fleet)), login }
    }

    /// Whether it is the product, which may be asked for more than the standard leaves open.
    pub(super) fn is_muster(&self) -> bool {
        matches!(self.server, Server::Muster(_))
    }

    /// A clean CONNECT of somebody who may do everything but subscribe to `test/nosubscribe`.
    pub(super) fn hello(&self, version: Version, client_id: &str) -> Connect {
        Connect::new(version, client_id, self.login.clone())
    }

    /// A connection on which nothing has been said.
    pub(super) async fn open(&self) -> Box<dyn Socket> {
        match &self.server {
            Server::Mosquitto { directory, .. } => {
                Box::new(UnixStream::connect(directory.path().join(SOCKET)).await.expect("mosquitto listens"))
            }
            Server::Muster(fleet) => Box::new(TcpStream::connect(fleet.mqtt_addr()).await.expect("Muster listens")),
        }
    }

    /// Says CONNECT, whatever the answer.
    pub(super) async fn ask(&self, connect: Connect) -> (Client, ConnAck) {
        Client::hello(self.open().await, &connect).await
    }

    /// Connects; the CONNACK is good.
    pub(super) async fn join(&self, connect: Connect) -> (Client, ConnAck) {
        let (client, connack) = self.ask(connect).await;
        assert_eq!(connack.code, 0, "{connack:?}");
        (client, connack)
    }

    /// Connects, clean.
    pub(super) async fn connect(&self, version: Version, client_id: &str) -> Client {
        self.join(self.hello(version, client_id)).await.0
    }
}

/// mosquitto's socket, in its directory.
const SOCKET: &str = "mqtt.sock";

/// What mosquitto's plugin lets everybody do.
static NO_SUBSCRIBE: LazyLock<Value> = LazyLock::new(|| {
    let deny = json!({ "acltype": "subscribeLiteral", "topic": "test/nosubscribe", "priority": 1, "allow": false });
    json!({
        "defaultACLAccess": {
            "publishClientSend": true, "publishClientReceive": true, "subscribe": true, "unsubscribe": true
        },
        "anonymousGroup": "everybody",
        "groups": [{ "groupname": "everybody", "roles": [{ "rolename": "everybody" }] }],
        "roles": [{ "rolename": "everybody", "acls": [deny] }],
    })
});

/// mosquitto's plugin for rules, wherever the machine's architecture puts it.
fn dynamic_security() -> PathBuf {
    let places = std::fs::read_dir("/usr/lib").expect("a system has /usr/lib").filter_map(Result::ok);
    let places = places.map(|place| place.path()).chain([PathBuf::from("/usr/lib")]);
    places
        .map(|place| place.join("mosquitto_dynamic_security.so"))
        .find(|plugin| plugin.exists())
        .expect("mosquitto's package has its plugin")
}

//! Audit: who changed what.

use std::fmt::Display;

use serde::Serialize;
use serde_json::Value;

use crate::id::DeviceId;

/// What was done to what.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    action: &'static str,
    id: String,
    device: Option<DeviceId>,
    before: Option<Value>,
    after: Option<Value>,
}

impl Entry {
    /// An action, `noun.verb` such as `device.update`, on the resource of that id; the noun says what kind of resource it is.
    pub fn of(action: &'static str, id: impl Display) -> Self {
        Self { action, id: id.to_string(), device: None, before: None, after: None }
    }

    /// The device it is about, when the resource is a device or belongs to one.
    #[must_use]
    pub fn on(self, device: &DeviceId) -> Self {
        Self { device: Some(device.clone()), ..self }
    }

    /// What the resource was, as the API answers it: without secrets.
    #[must_use]
    pub fn before(self, body: &impl Serialize) -> Self {
        Self { before: Some(plain(body)), ..self }
    }

    /// What the resource has become, as the API answers it: without secrets.
    #[must_use]
    pub fn after(self, body: &impl Serialize) -> Self {
        Self { after: Some(plain(body)), ..self }
    }

    /// What was done.
    pub fn action(&self) -> &'static str {
        self.action
    }

    /// To which resource.
    pub fn id(&self) -> &str {
        &self.id
    }
}

fn plain(body: &impl Serialize) -> Value {
    serde_json::to_value(body).expect("the bodies of the API are plain data")
}

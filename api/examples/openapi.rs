//! Writes `api/openapi.json`, from which the console's client is made; a test compares it with the code.

fn main() -> std::io::Result<()> {
    std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json"), api::openapi_json())
}

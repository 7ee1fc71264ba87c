//! A new migration changes what `sqlx::migrate!` compiles in.

fn main() {
    println!("cargo:rerun-if-changed=migrations");
}

//! placeholder
pub async fn serve() {}

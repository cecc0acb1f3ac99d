//! Which orders are to expire, and who does it.

use super::pack::Pack;
use super::words::Words;
use super::{Connection, Error, keys, script};
use crate::domain::Id;
use crate::limits::EXPIRE_LEASE_MS;

/// What is due.
#[derive(Debug, Default)]
pub struct Due {
    /// Redis's clock, in Unix ms.
    pub now_ms: i64,
    /// Orders whose time has passed, the oldest first.
    pub orders: Vec<Id>,
}

/// Has orders that are due and do not expire stand behind others, each up to a time (Unix ms, Redis's clock): whoever reads the next that are due
/// is not given them over and over.
pub async fn postpone(connection: &mut Connection, instance: &str, orders: &[(Id, i64)]) -> Result<(), Error> {
    let mut packed = Pack::default();
    packed.array(orders.len());
    for (order, until) in orders {
        packed.array(2).text(order.as_str()).integer(*until);
    }
    let arguments = [instance.as_bytes(), &packed.into_bytes()];
    connection.run(&script::EXPIRY_POSTPONE, &[keys::SWEEPER, keys::EXPIRY], &arguments).await?;
    Ok(())
}

/// Takes or renews the right to expire orders for `instance`, and reads the first `limit` that are due. `None` where another sidecar has the
/// right.
pub async fn due(connection: &mut Connection, instance: &str, limit: usize) -> Result<Option<Due>, Error> {
    let numbers = [EXPIRE_LEASE_MS.to_string(), limit.to_string()];
    let [lease_ms, limit] = numbers.each_ref().map(|number| number.as_bytes());
    let answer = connection.run(&script::EXPIRY_DUE, &[keys::SWEEPER, keys::EXPIRY], &[instance.as_bytes(), lease_ms, limit]).await?;
    let mut words = Words::new(answer)?;
    let Ok(now_ms) = words.integer() else { return Ok(None) };
    let mut orders = Vec::new();
    while let Ok(order) = words.text() {
        orders.push(Id::from(order.as_str()));
    }
    Ok(Some(Due { now_ms, orders }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::testing::RedisServer;

    #[tokio::test]
    async fn what_is_postponed_is_due_later_unless_it_was_extended() {
        let server = RedisServer::start();
        let mut connection = Connection::open(&server.url()).await.unwrap();
        let mut add = redis::cmd("ZADD");
        add.arg(keys::EXPIRY).arg(&["1", "stuck", "2", "due", "99999999999999", "extended"]);
        connection.send(&add).await.unwrap();
        let orders = ["stuck", "extended", "gone"].map(|order| (Id::from(order), 88_888_888_888_888));
        postpone(&mut connection, "i", &orders).await.unwrap();
        let named = |due: Option<Due>| due.unwrap().orders.iter().map(Id::to_string).collect::<Vec<_>>();
        assert_eq!(named(due(&mut connection, "i", 9).await.unwrap()), ["stuck", "due"], "it had no right to");
        postpone(&mut connection, "i", &orders).await.unwrap();
        assert_eq!(named(due(&mut connection, "i", 9).await.unwrap()), ["due"]);
        let listed = connection.send(redis::cmd("ZRANGE").arg(keys::EXPIRY).arg(0).arg(-1).arg("WITHSCORES")).await.unwrap();
        let listed: Vec<String> = redis::from_redis_value(listed).unwrap();
        assert_eq!(listed, ["due", "2", "stuck", "88888888888888", "extended", "99999999999999"]);
    }
}

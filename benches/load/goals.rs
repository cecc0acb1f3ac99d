//! What each case is to reach, in one table.

/// What a figure is to be.
#[derive(Clone, Copy)]
pub enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

pub struct Goal {
    pub slug: &'static str,
    pub title: &'static str,
    pub unit: &'static str,
    pub bound: Bound,
}

const fn at_least(slug: &'static str, bound: f64, unit: &'static str, title: &'static str) -> Goal {
    Goal { slug, title, unit, bound: Bound::AtLeast(bound) }
}

const fn at_most(slug: &'static str, bound: f64, unit: &'static str, title: &'static str) -> Goal {
    Goal { slug, title, unit, bound: Bound::AtMost(bound) }
}

/// A ratio: what does not depend on how fast the machine is, so that a short run may fail by it.
pub const RATIO: &str = "x";

/// A short run fails below this part of a ratio's goal: it is noisy, and is to find what is broken.
pub const SHORT_PART: f64 = 0.5;

pub const GOALS: &[Goal] = &[
    at_least("hot-p16", 5.0, RATIO, "one product, 50 connections, pipeline 16 / direct"),
    at_least("many-p16", 2.5, RATIO, "10,000 products, 50 connections, pipeline 16 / direct"),
    at_least("hot-p1", 1.3, RATIO, "one product, 50 connections / direct"),
    at_least("many-p1", 1.0, RATIO, "10,000 products, 50 connections / direct"),
    at_least("many-p1-c200", 1.3, RATIO, "10,000 products, 200 connections / direct"),
    at_least("soldout-p16", 4.0, RATIO, "sold out, 50 connections, pipeline 16 / direct"),
    at_least("hot-p16-redis-cpu", 15.0, RATIO, "Redis CPU a decrement, direct / one product, pipeline 16"),
    at_least("many-p16-redis-cpu", 3.0, RATIO, "Redis CPU a decrement, direct / 10,000 products, pipeline 16"),
    at_least("coupon-locks", 30.0, RATIO, "COUPON.ISSUE held, one coupon, 100 connections / the best lock an issue"),
    at_least("for-update", 80.0, RATIO, "one product, 100 connections / SELECT FOR UPDATE in Postgres"),
    at_least("products-1m", 0.9, RATIO, "1,000,000 products / one, 50 connections"),
    at_least("import", 0.9, RATIO, "one product, pipeline 16, with 1,000,000 imported / without"),
    at_most("import-1m", 120.0, "s", "1,000,000 products imported"),
    at_least("connections-10k", 0.75, RATIO, "10,000 connections / one, with pipeline"),
    at_most("reserve-cost", 3.0, RATIO, "Redis CPU, RESERVE of 5 products / DECR ORDER of one, of 10,000"),
    at_most("reserve-cost-alone", 3.0, RATIO, "Redis CPU, RESERVE of 5 products / DECR of one, each alone"),
    at_most("expire-100k", 10.0, "s", "100,000 due orders expire"),
    at_most("expire-p99", 20.0, "ms", "p99 of STOCK.DECR meanwhile"),
    at_least("relay-alone", 100_000.0, "/s", "relay alone, one product"),
    at_least("sustained", 60_000.0, "/s", "sustained, one product: everything together, lag below 1 s"),
    at_least("sustained-batch", 60_000.0, "/s", "sustained, one product, a row a batch"),
    at_least("relay-batch", 300_000.0, "/s", "relay alone, one product, a row a batch"),
    at_least("ack-postgres", 10_000.0, "/s", "STOCK.DECR ACK postgres, 100 connections"),
    at_most("ack-postgres-p99", 30.0, "ms", "the same, p99"),
    at_most("half-peak-p99", 5.0, "ms", "at half the peak, from when it was to be sent: p99"),
    at_most("half-peak-p999", 20.0, "ms", "the same, p99.9"),
    at_most("half-peak-max", 100.0, "ms", "the same, max"),
    at_least("overload", 80.0, "%", "useful work kept at 10 times what it can, of the peak"),
    at_least("overload-in-time", 100.0, "%", "replies within 100 ms then"),
    at_most("memory-idle", 30.0, "MiB", "memory, idle"),
    at_most("memory-connection", 12.0, "KiB", "memory of an idle connection"),
    at_most("memory-behind", 256.0, "MiB", "memory with 1,000,000 changes not in Postgres"),
];

impl Goal {
    pub fn of(slug: &str) -> Option<&'static Self> {
        GOALS.iter().find(|goal| goal.slug == slug)
    }

    /// How much of the goal is reached: 1 or more where all of it.
    pub fn reached(&self, figure: f64) -> f64 {
        match self.bound {
            Bound::AtLeast(bound) => figure / bound,
            Bound::AtMost(bound) => bound / figure.max(f64::MIN_POSITIVE),
        }
    }

    pub fn bound_text(&self) -> String {
        let (sign, bound) = match self.bound {
            Bound::AtLeast(bound) => ("≥", bound),
            Bound::AtMost(bound) => ("≤", bound),
        };
        format!("{sign} {bound} {}", self.unit)
    }
}

//! The README's table of flows, word for word.

use crate::harness::Stack;

/// What stands in the table for what is different each time.
fn fits(shown: &str, told: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match shown {
        "position" => told.split_once('-').is_some_and(|(epoch, n)| digits(epoch) && digits(n)),
        "expires_at_ms" if told != shown => digits(told) && told.len() == 13,
        "token" => digits(told),
        _ => shown == told,
    }
}

/// The rows of the table: command and reply.
fn flows(readme: &str) -> Vec<(String, String)> {
    let table = readme.lines().skip_while(|line| !line.starts_with("## Which command carries which flow"));
    let rows = table.skip_while(|line| !line.starts_with("|---")).skip(1).take_while(|line| line.starts_with('|'));
    let code = |cell: &str| cell.trim().trim_matches('`').to_owned();
    rows.map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").collect();
        (code(cells[1]), code(cells[2]))
    })
    .collect()
}

#[test]
fn the_readmes_flows_answer_what_it_says() {
    let stack = Stack::start();
    let mut client = stack.connect();
    let flows = flows(include_str!("../../README.md"));
    assert!(flows.len() > 15, "{flows:?}");
    for (command, reply) in &flows {
        let told = client.ask(command).replace(['[', ']'], "");
        let (shown, told_words): (Vec<&str>, Vec<&str>) = (reply.split(", ").collect(), told.split(", ").collect());
        let is_so = shown.len() == told_words.len() && shown.iter().zip(&told_words).all(|(shown, told)| fits(shown, told));
        assert!(is_so, "{command}: {told}, and the README says {reply}");
    }
}

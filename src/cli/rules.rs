//! Groups and rules, by command.

use clap::{Args, Subcommand};
use hyper::Method;
use serde_json::{Value, json};

use super::args::{Changes, Named};
use super::client::{Body, Client};
use super::command::{change, remove, set};

#[derive(Debug, Subcommand)]
pub(super) enum GroupCommand {
    /// Add a group; ports are put in it with `port set NAME groups=...`
    Add {
        /// Its name
        name: String,
        /// Addresses that belong to it, as 10.1.0.0/16; may be repeated
        #[arg(long = "prefix", value_name = "PREFIX")]
        prefixes: Vec<String>,
        /// What names it in tunnel headers, 1 to 65535 [default: nothing does]
        #[arg(long)]
        id: Option<u16>,
    },
    /// Remove a group
    Del(Named),
    /// Change keys of a group: prefixes, id; `key=` removes one
    Set(Changes),
}

#[derive(Debug, Subcommand)]
pub(super) enum RuleCommand {
    /// Add a rule
    Add {
        /// Its name [default: made up, as web-ingress-1]
        name: Option<String>,
        #[command(flatten)]
        keys: RuleKeys,
    },
    /// Remove a rule
    Del(Named),
    /// Change keys of a rule; `key=` removes one, as in `deny= allow=tcp`
    Set(Changes),
}

#[derive(Debug, Args)]
pub(super) struct RuleKeys {
    /// The group whose ports it applies to
    #[arg(long)]
    group: String,
    /// ingress: into the VM; egress: out of it
    #[arg(long)]
    direction: String,
    /// Let this protocol pass: tcp, udp, icmp, icmpv6, sctp, any, or a number
    #[arg(long, value_name = "PROTOCOL")]
    allow: Option<String>,
    /// Drop this protocol
    #[arg(long, value_name = "PROTOCOL")]
    deny: Option<String>,
    /// Destination ports, as 80,443,8000-8080 [default: all]
    #[arg(long)]
    ports: Option<String>,
    /// ICMP types, as echo-request,3/4 [default: all]
    #[arg(long)]
    icmp: Option<String>,
    /// Source of ingress: group:NAME, a prefix, or any [default: any]
    #[arg(long)]
    from: Option<String>,
    /// Destination of egress: group:NAME, a prefix, or any [default: any]
    #[arg(long)]
    to: Option<String>,
    /// Of the rules that match, the highest decides; at equal priority deny [default: 100]
    #[arg(long)]
    priority: Option<u16>,
    /// Log what it decides
    #[arg(long)]
    log: bool,
}

pub(super) fn group(client: &Client, command: GroupCommand) -> Result<(), String> {
    match command {
        GroupCommand::Add { name, prefixes, id } => {
            let object = json!({"name": name, "prefixes": prefixes, "id": id});
            change(client, Method::POST, "/v1/groups", Body::Json(object))
        }
        GroupCommand::Del(object) => remove(client, "groups", &object),
        GroupCommand::Set(changes) => set(client, "groups", &changes),
    }
}

pub(super) fn rule(client: &Client, command: RuleCommand) -> Result<(), String> {
    match command {
        RuleCommand::Add { name, keys } => change(client, Method::POST, "/v1/rules", Body::Json(new_rule(name, keys))),
        RuleCommand::Del(object) => remove(client, "rules", &object),
        RuleCommand::Set(changes) => set(client, "rules", &changes),
    }
}

fn new_rule(name: Option<String>, keys: RuleKeys) -> Value {
    let RuleKeys { group, direction, allow, deny, ports, icmp, from, to, priority, log } = keys;
    json!({
        "name": name, "group": group, "direction": direction, "allow": allow, "deny": deny, "ports": ports,
        "icmp": icmp, "from": from, "to": to, "priority": priority, "log": log,
    })
}

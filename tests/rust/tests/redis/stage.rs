//! The stage itself: a test that passes because its server was never killed proves nothing.
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use polybus_conformance::DEADLINE;
use polybus_conformance::certificates::Certificates;
use polybus_conformance::proxy::Proxy;
use polybus_conformance::redis_server::*;

#[test]
fn a_server_is_private_and_goes_with_its_test() {
    let server = RedisServer::start();
    assert_eq!(server.url(), format!("redis://{}", server.address()));
    assert_eq!(server.cli(&["CONFIG", "GET", "appendonly"]), "appendonly\nno");
    server.cli(&["SET", "a", "1"]);
    let folder = server.cli(&["CONFIG", "GET", "dir"]).lines().last().unwrap().to_owned();
    let (other, port) = (RedisServer::start(), server.port());
    assert_eq!(other.cli(&["EXISTS", "a"]), "0");
    drop(server);
    assert_eq!(TcpStream::connect(("127.0.0.1", port)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert!(!std::path::Path::new(&folder).exists());
}

#[test]
fn what_a_restart_finds() {
    let options = Options { appendfsync: Some("always"), maxmemory: Some("20mb"), ..Options::default() };
    let mut server = RedisServer::with(options);
    let port = server.port();
    assert_eq!(server.cli(&["CONFIG", "GET", "maxmemory"]), "maxmemory\n20971520");
    server.cli(&["SET", "a", "1"]);
    server.kill9();
    server.restart(Data::Kept);
    assert_eq!((server.port(), server.cli(&["GET", "a"])), (port, "1".to_owned()));
    server.stop();
    server.restart(Data::Lost);
    assert_eq!(server.cli(&["EXISTS", "a"]), "0");
    server.restart(Data::Kept); // while it runs
    let mut forgetful = RedisServer::start();
    forgetful.cli(&["SET", "a", "1"]);
    forgetful.restart(Data::Kept);
    assert_eq!(forgetful.cli(&["EXISTS", "a"]), "0");
}

#[test]
fn a_paused_server_answers_when_it_is_resumed() {
    let server = RedisServer::start();
    server.pause();
    let mut client = TcpStream::connect(server.address()).unwrap(); // the kernel accepts
    client.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    client.write_all(b"PING\r\n").unwrap();
    assert_eq!(client.read(&mut [0; 7]).unwrap_err().kind(), ErrorKind::WouldBlock);
    server.resume();
    assert_eq!(answer(&mut client), "+PONG\r\n");
}

#[test]
fn a_password_is_needed() {
    let server = RedisServer::with(Options { password: Some("pass"), ..Options::default() });
    assert_eq!(server.url(), format!("redis://:pass@{}", server.address()));
    let mut client = TcpStream::connect(server.address()).unwrap();
    client.write_all(b"PING\r\n").unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut told = [0; 7];
    client.read_exact(&mut told).unwrap();
    assert_eq!(&told, b"-NOAUTH");
}

#[test]
fn tls_is_checked_on_both_sides() {
    for (tls, needs_client) in [(Tls::On, false), (Tls::Mutual, true)] {
        let server = RedisServer::with(Options { tls, ..Options::default() });
        assert_eq!(server.cli(&["PING"]), "PONG");
        assert_eq!(server.url().contains("cert_file="), needs_client);
        let made = server.certificates().unwrap();
        assert_eq!(ping(&server, made), !needs_client, "without a client's certificate");
        assert!(!ping(&server, &Certificates::new()), "trusted by another authority");
    }
}

/// Whether redis-cli gets an answer when it trusts that authority and shows no certificate.
fn ping(server: &RedisServer, trusted: &Certificates) -> bool {
    let port = server.port().to_string();
    let mut cli = Command::new("redis-cli");
    cli.args(["-h", "127.0.0.1", "-p", &port, "--tls", "--cacert"]).arg(trusted.authority()).arg("PING");
    cli.output().unwrap().stdout == b"PONG\n"
}

#[test]
fn a_replica_follows_its_master() {
    let master = RedisServer::start();
    let replica = RedisServer::with(Options { replica_of: Some(master.port()), ..Options::default() });
    replica.until(&["INFO", "replication"], "master_link_status:up");
    master.cli(&["SET", "a", "1"]);
    // Not WAIT: it counts what its own connection wrote, and each redis-cli has another.
    replica.until(&["GET", "a"], "1");
}

#[test]
fn a_cluster_serves_all_slots() {
    let cluster = Cluster::start();
    assert!(cluster.url().starts_with("redis+cluster://127.0.0.1:"));
    let info = cluster.nodes[0].cli(&["CLUSTER", "INFO"]);
    assert!(info.contains("cluster_slots_ok:16384") && info.contains("cluster_size:3"), "{info}");
}

#[test]
fn sentinels_choose_another_master() {
    let mut group = Sentinels::with(Options { password: Some("pass"), ..Options::default() });
    assert!(group.url().starts_with("redis+sentinel://:pass@127.0.0.1:"));
    assert!(group.url().ends_with("/main"));
    let ask = ["SENTINEL", "GET-MASTER-ADDR-BY-NAME", Sentinels::NAME];
    assert_eq!(group.sentinels[0].cli(&ask), format!("127.0.0.1\n{}", group.master.port()));
    group.master.kill9();
    group.sentinels[0].until(&ask, &group.replica.port().to_string());
    group.replica.until(&["INFO", "replication"], "role:master");
}

#[test]
fn a_black_hole_holds_back_and_heals() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    let mut client = TcpStream::connect(proxy.address()).unwrap();
    client.write_all(b"PING\r\n").unwrap();
    assert_eq!(answer(&mut client), "+PONG\r\n");
    proxy.black_hole();
    client.write_all(b"PING\r\n").unwrap();
    client.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert_eq!(client.read(&mut [0; 7]).unwrap_err().kind(), ErrorKind::WouldBlock);
    proxy.heal();
    assert_eq!(answer(&mut client), "+PONG\r\n");
    assert_eq!(proxy.accepted(), 1);
}

#[test]
fn a_cut_connection_ends_and_the_next_is_served() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    for round in 1..=2 {
        let mut client = TcpStream::connect(proxy.address()).unwrap();
        client.write_all(b"PING\r\n").unwrap();
        assert_eq!(answer(&mut client), "+PONG\r\n");
        proxy.cut();
        assert_eq!(client.read(&mut [0; 7]).unwrap(), 0);
        assert_eq!(proxy.accepted(), round);
    }
}

#[test]
fn a_request_is_done_and_its_answer_cut() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    for (pass, expected) in [(0, ""), (2, ":1")] {
        let mut client = TcpStream::connect(proxy.address()).unwrap();
        proxy.cut_after(pass);
        client.write_all(b"INCR a\r\n").unwrap();
        let mut told = String::new();
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        client.read_to_string(&mut told).unwrap();
        assert_eq!(told, expected);
        assert_eq!(server.cli(&["GETDEL", "a"]), "1");
    }
}

fn answer(client: &mut TcpStream) -> String {
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut told = [0; 7];
    client.read_exact(&mut told).unwrap();
    String::from_utf8(told.to_vec()).unwrap()
}

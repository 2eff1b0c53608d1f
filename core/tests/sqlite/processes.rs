//! More than one process on one file: children of this very program, some of them killed.

use std::collections::HashSet;
use std::io::{BufReader, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use polybus_core::ErrorKind;
use polybus_core::delivery::Verdict;
use polybus_core::transport::GroupSpec;

use crate::support::*;

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().unwrap().block_on(work)
}

fn short_lease() -> GroupSpec {
    GroupSpec { lease: Duration::from_millis(1000), ..spec("g") }
}

/// Says `signal` to the parent, on a line of its own.
fn say(signal: &str) {
    println!("\n{signal}");
    std::io::stdout().flush().unwrap();
}

#[test]
fn another_process_takes_over_from_one_that_was_killed() {
    const NAME: &str = "processes::another_process_takes_over_from_one_that_was_killed";
    if let Some((_, path)) = role() {
        return run(async {
            let bus = open(&path).await;
            let source = bus.subscribe(short_lease()).await.unwrap();
            say("ready");
            take_all(&source, 20).await;
            say("holding");
            std::future::pending::<()>().await;
        });
    }
    let place = place();
    run(async {
        let bus = open(&place.path).await;
        let mut child = child(NAME, "victim", &place.path);
        let mut output = BufReader::new(child.stdout.take().unwrap());
        wait_line(&mut output, "ready");
        publish(&bus, 0..20).await;
        wait_line(&mut output, "holding");
        child.kill().unwrap();
        let died = Instant::now();
        child.wait().unwrap();
        let source = bus.subscribe(short_lease()).await.unwrap();
        let taken = take_all(&source, 20).await;
        assert!(died.elapsed() < Duration::from_millis(2000), "{:?}", died.elapsed());
        assert!(taken.iter().all(|delivery| delivery.attempt == 2));
        assert_eq!(settle(&source, &taken, Verdict::Ack).await, 0);
        bus.close().await;
    });
}

#[test]
fn several_processes_share_a_group_and_lose_nothing() {
    const NAME: &str = "processes::several_processes_share_a_group_and_lose_nothing";
    const EVENTS: usize = 4000;
    if let Some((role, path)) = role() {
        return run(async {
            let bus = open(&path).await;
            if role == "publisher" {
                for batch in 0..EVENTS / 40 {
                    publish(&bus, batch * 40..(batch + 1) * 40).await;
                }
                bus.close().await;
                return;
            }
            let source = bus.subscribe(short_lease()).await.unwrap();
            say("ready");
            loop {
                let taken = take(&source, 50).await;
                let seen = numbers(&taken);
                assert_eq!(settle(&source, &taken, Verdict::Ack).await, 0);
                say(&format!("seen {}", seen.iter().map(usize::to_string).collect::<Vec<_>>().join(" ")));
            }
        });
    }
    let place = place();
    let mut workers: Vec<_> = (0..2).map(|_| child(NAME, "worker", &place.path)).collect();
    let mut outputs: Vec<_> = workers.iter_mut().map(|child| BufReader::new(child.stdout.take().unwrap())).collect();
    outputs.iter_mut().for_each(|output| drop(wait_line(output, "ready")));
    let mut publisher = child(NAME, "publisher", &place.path);
    let (send, seen) = std::sync::mpsc::channel();
    for mut output in outputs {
        let send = send.clone();
        std::thread::spawn(move || {
            loop {
                let line = wait_line(&mut output, "seen");
                let numbers = line.split_whitespace().skip(1).map(|n| n.parse::<usize>().unwrap());
                if numbers.into_iter().try_for_each(|n| send.send(n)).is_err() {
                    return;
                }
            }
        });
    }
    let mut all = Vec::new();
    while all.len() < EVENTS {
        all.push(seen.recv_timeout(PATIENCE).expect("every event arrives"));
    }
    assert!(publisher.wait().unwrap().success());
    for worker in &mut workers {
        worker.kill().unwrap();
        worker.wait().unwrap();
    }
    assert_eq!(all.iter().collect::<HashSet<_>>().len(), EVENTS, "nothing twice, nothing lost");
}

/// What a publisher confirmed before it was killed is there, with either durability, and the file is sound.
#[test]
fn confirmed_events_survive_a_killed_publisher() {
    const NAME: &str = "processes::confirmed_events_survive_a_killed_publisher";
    if let Some((_, path)) = role() {
        return run(async {
            let bus = open(&path).await;
            for n in 0.. {
                publish(&bus, n..n + 1).await;
                say(&format!("confirmed {n}"));
            }
        });
    }
    let place = place();
    run(async {
        let bus = open(&place.path).await;
        let source = bus.subscribe(spec("g")).await.unwrap();
        bus.close().await;
        drop(source);
        let mut child = child(NAME, "publisher", &place.path);
        let mut output = BufReader::new(child.stdout.take().unwrap());
        wait_line(&mut output, "confirmed 200");
        child.kill().unwrap();
        child.wait().unwrap();
        let mut last = 200;
        let mut rest = String::new();
        std::io::Read::read_to_string(&mut output, &mut rest).unwrap();
        for line in rest.lines().filter_map(|line| line.strip_prefix("confirmed ")) {
            last = line.parse().unwrap_or(last);
        }
        let bus = open(&place.path).await;
        let source = bus.subscribe(spec("g")).await.unwrap();
        assert_eq!(numbers(&take_all(&source, last + 1).await), (0..=last).collect::<Vec<_>>());
        bus.close().await;
    });
}

/// A forked child must not use what it inherited, and what it opens must have locks of its own: otherwise the parent's
/// close, believing itself the last, would throw away the log that the child writes to.
#[test]
fn a_forked_child_has_a_store_of_its_own() {
    const NAME: &str = "processes::a_forked_child_has_a_store_of_its_own";
    let Some((_, path)) = role() else {
        let place = place();
        let child = child(NAME, "parent", &place.path);
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && said.contains("child confirmed"), "{said}");
        run(async {
            let bus = open(&place.path).await;
            let source = bus.subscribe(spec("g")).await.unwrap();
            let mut seen = numbers(&take_all(&source, 60).await);
            seen.sort_unstable();
            assert_eq!(seen, (0..60).collect::<Vec<_>>());
            bus.close().await;
        });
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (bus, source) = runtime.block_on(async {
        let bus = open(&path).await;
        let source = bus.subscribe(spec("g")).await.unwrap();
        publish(&bus, 0..10).await;
        (bus, source)
    });
    let (mut read, mut write) = std::io::pipe().unwrap();
    let (mut read_back, mut write_back) = std::io::pipe().unwrap();
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let inherited =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
                    let refused = bus.publish(vec![outgoing(0)], PATIENCE).await.unwrap_err();
                    assert_eq!(refused.kind(), ErrorKind::ConnectionFailed, "{refused}");
                    source.close().await;
                    bus.close().await;
                    let own = open(&path).await;
                    publish(&own, 10..20).await;
                    write.write_all(b"x").unwrap();
                    // The parent closes now, as the last of its process.
                    std::io::Read::read_exact(&mut read_back, &mut [0]).unwrap();
                    for n in 20..60 {
                        publish(&own, n..n + 1).await;
                    }
                    own
                });
            drop((bus, source)); // inherited: must neither hang nor touch the file
            say("child confirmed");
            std::mem::forget(inherited); // killed, not closed
        }));
        unsafe { libc::_exit(i32::from(done.is_err())) };
    }
    std::io::Read::read_exact(&mut read, &mut [0]).unwrap();
    runtime.block_on(async {
        source.close().await;
        bus.close().await;
    });
    assert!(Path::new(&format!("{}-wal", path.display())).exists(), "the child still has the log open");
    write_back.write_all(b"x").unwrap();
    let mut status = 0;
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert_eq!(status, 0);
}

/// The lock files that a child inherits are closed in it: a dead parent's lock must not live on in its child.
#[test]
fn a_forked_child_does_not_keep_its_dead_parents_locks() {
    const NAME: &str = "processes::a_forked_child_does_not_keep_its_dead_parents_locks";
    if let Some((_, path)) = role() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let bus = runtime.block_on(open(&path));
        let publisher = bus.clone();
        // Writes all the time, so that the fork and the kill often meet a held lock.
        runtime.spawn(async move {
            for n in 0.. {
                publish(&publisher, n..n + 50).await;
            }
        });
        let forked = (0..20).map(|_| match unsafe { libc::fork() } {
            0 => {
                std::thread::sleep(PATIENCE);
                unsafe { libc::_exit(0) }
            }
            pid => pid.to_string(),
        });
        say(&format!("pids: {}", forked.collect::<Vec<_>>().join(" ")));
        std::thread::sleep(PATIENCE);
        return;
    }
    let place = place();
    let mut child = child(NAME, "parent", &place.path);
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let forked = wait_line(&mut output, "pids:");
    child.kill().unwrap();
    child.wait().unwrap();
    let started = Instant::now();
    run(async {
        let bus = open(&place.path).await;
        publish(&bus, 0..1).await;
        bus.close().await;
    });
    for pid in forked.split_whitespace().skip(1) {
        unsafe { libc::kill(pid.parse().unwrap(), libc::SIGKILL) };
    }
    assert!(started.elapsed() < PATIENCE / 2, "the grandchildren lived on and must not have held the lock");
}

/// On a file system of 2 MB. A full disk fails the publish, stores nothing of it, and is over when there is room.
#[test]
fn a_full_disk_fails_the_publish_and_nothing_else() {
    const NAME: &str = "processes::a_full_disk_fails_the_publish_and_nothing_else";
    if let Some((_, path)) = role() {
        return run(async {
            let filler = path.with_file_name("filler");
            std::fs::write(&filler, vec![1_u8; 1 << 20]).unwrap();
            let bus = open(&path).await;
            let source = bus.subscribe(spec("g")).await.unwrap();
            let mut stored = 0;
            let cause = loop {
                match bus.publish((stored..stored + 20).map(outgoing).collect(), PATIENCE).await {
                    Ok(_) => stored += 20,
                    Err(cause) => break cause,
                }
            };
            assert_eq!(cause.kind(), ErrorKind::ConnectionFailed);
            assert!(cause.to_string().contains("disk"), "{cause}");
            std::fs::remove_file(&filler).unwrap();
            publish(&bus, stored..stored + 1).await;
            let seen = numbers(&take_all(&source, stored + 1).await);
            assert_eq!(seen, (0..=stored).collect::<Vec<_>>(), "nothing of the failed batch");
            bus.close().await;
            say("survived");
        });
    }
    let place = place();
    let script = format!(
        "mount -t tmpfs -o size=2m tmpfs '{}' && exec \"$0\" --exact {NAME} --nocapture",
        place.directory.path().display()
    );
    let output = std::process::Command::new("unshare")
        .args(["-m", "sh", "-c", &script])
        .arg(std::env::current_exe().unwrap())
        .env("POLYBUS_ROLE", "full")
        .env("POLYBUS_PATH", &place.path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        said.contains("survived"),
        "needs root for a file system of its own\n{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

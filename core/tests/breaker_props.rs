//! The breaker against a model that remembers everything, with a clock that the test moves.

use std::time::Duration;

use polybus_core::breaker::{Breaker, BreakerOptions, Ended, Phase, Ticket};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Step {
    Wait(u64),
    Begin,
    /// One of the calls that run, and how it ends.
    End(usize, Ended),
}

fn step() -> impl Strategy<Value = Step> {
    let ended = prop_oneof![3 => Just(Ended::Failed), 2 => Just(Ended::Succeeded), 1 => Just(Ended::Neither)];
    prop_oneof![
        (0..40_u64).prop_map(Step::Wait),
        Just(Step::Begin),
        (any::<usize>(), ended).prop_map(|(which, ended)| Step::End(which, ended)),
    ]
}

/// The definition, word for word: all that happened, looked through again at each question.
struct Model {
    options: BreakerOptions,
    now: u64,
    phase: Phase,
    since: u64,
    failures: Vec<u64>,
    probes: Vec<Option<Ended>>,
}

impl Model {
    fn enter(&mut self, phase: Phase) {
        (self.phase, self.since) = (phase, self.now);
        self.failures.clear();
        self.probes.clear();
    }

    fn free(&self) -> usize {
        let most = self.options.probes as usize;
        match self.phase {
            Phase::Closed => usize::MAX,
            Phase::Open => 0,
            Phase::HalfOpen => most - self.probes.iter().filter(|probe| **probe != Some(Ended::Neither)).count(),
        }
    }

    fn wait(&mut self, ms: u64) {
        self.now += ms;
        if self.phase == Phase::Open && self.now >= self.since + self.options.recovery.as_millis() as u64 {
            self.enter(Phase::HalfOpen);
        }
    }

    fn end(&mut self, probe: Option<usize>, ended: Ended) {
        match self.phase {
            Phase::Closed if ended == Ended::Failed => {
                self.failures.push(self.now);
                let window = self.options.window.as_millis() as u64;
                let recent = self.failures.iter().filter(|at| **at + window >= self.now).count();
                if recent >= self.options.threshold as usize {
                    self.enter(Phase::Open);
                }
            }
            Phase::HalfOpen => {
                let Some(probe) = probe else { return };
                self.probes[probe] = Some(ended);
                let good = self.probes.iter().filter(|probe| **probe == Some(Ended::Succeeded)).count();
                if ended == Ended::Failed {
                    self.enter(Phase::Open);
                } else if good >= self.options.probes as usize {
                    self.enter(Phase::Closed);
                }
            }
            Phase::Closed | Phase::Open => {}
        }
    }
}

struct Call {
    ticket: Ticket,
    term: u32,
    probe: Option<usize>,
}

proptest! {
    #[test]
    fn does_what_the_model_does(
        threshold in 1..6_u32, window in 1..60_u64, recovery in 1..60_u64, probes in 1..4_u32,
        steps in proptest::collection::vec(step(), 1..200),
    ) {
        let ms = Duration::from_millis;
        let options = BreakerOptions { threshold, window: ms(window), recovery: ms(recovery), probes };
        let mut breaker = Breaker::new(options.clone());
        let (failures, seen) = (Vec::new(), Vec::new());
        let mut model = Model { options, now: 0, phase: Phase::Closed, since: 0, failures, probes: seen };
        let (mut running, mut term): (Vec<Call>, u32) = (Vec::new(), 0);
        for step in steps {
            let before = model.phase;
            let changed = match step {
                Step::Wait(by) => {
                    model.wait(by);
                    breaker.advance(ms(model.now))
                }
                Step::Begin if model.free() > 0 => {
                    let probe = (model.phase == Phase::HalfOpen).then_some(model.probes.len());
                    if probe.is_some() {
                        model.probes.push(None);
                    }
                    running.push(Call { ticket: breaker.begin(), term, probe });
                    false
                }
                Step::End(which, ended) if !running.is_empty() => {
                    let call = running.swap_remove(which % running.len());
                    if call.term == term {
                        model.end(call.probe, ended);
                    }
                    breaker.end(call.ticket, ended, ms(model.now))
                }
                Step::Begin | Step::End(..) => false,
            };
            prop_assert_eq!(changed, before != model.phase);
            term += u32::from(changed);
            prop_assert_eq!(breaker.phase(), model.phase);
            prop_assert_eq!(breaker.free(), model.free());
            prop_assert_eq!(breaker.due().is_some(), model.phase == Phase::Open);
        }
    }
}

#[test]
fn a_straggler_of_the_outage_says_nothing() {
    let mut breaker = Breaker::new(BreakerOptions { threshold: 1, ..BreakerOptions::default() });
    let (first, late) = (breaker.begin(), breaker.begin());
    assert!(breaker.end(first, Ended::Failed, Duration::ZERO));
    assert!(!breaker.advance(Duration::from_secs(29)));
    assert!(breaker.advance(Duration::from_secs(30)));
    let probe = breaker.begin();
    assert_eq!(breaker.free(), 0);
    assert!(!breaker.end(late, Ended::Failed, Duration::from_secs(31)), "it began before");
    assert_eq!(breaker.phase(), Phase::HalfOpen);
    assert!(breaker.end(probe, Ended::Succeeded, Duration::from_secs(32)));
    assert_eq!(breaker.phase(), Phase::Closed);
}

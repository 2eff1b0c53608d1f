"""Processes, loops and threads that come and go. Each scenario is a program of its own."""

from __future__ import annotations

import signal
import time

import pytest

from program import Program, run
from store import Store


@pytest.fixture
def url(store: Store, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TEST_BUS", store.name)
    return store.url


@pytest.mark.parametrize("scheme", ["memory", "sqlite"])
@pytest.mark.parametrize("close", [True, False])
def test_clean_exit(url: str, scheme: str, close: bool) -> None:
    out = run(
        """
        bus = Bus(URL, service="shop")
        @bus.on("x")
        async def one(event):
            await asyncio.sleep(1000)
        @bus.on("x")
        def two(event):
            time.sleep(1000)
        @bus.on("y")
        def three(event): ...
        async def main():
            await bus.start()
            await bus.publish("x")
            await bus.publish("y")
            await asyncio.sleep(0.2)
            if len(sys.argv) > 2:
                await bus.close(0)
            say("end")
        asyncio.run(main())
        """,
        url if scheme == "sqlite" else "memory://",
        *(["close"] if close else []),
    )
    assert out == "end\n"


@pytest.mark.every_transport
def test_exit_of_a_blocking_program_without_close(url: str) -> None:
    out = run(
        """
        bus = Bus(URL, service="shop")
        done = threading.Event()
        @bus.on("x")
        def handler(event):
            say(event.payload)
            done.set()
        bus.blocking.start()
        bus.blocking.publish("x", "hello")
        assert done.wait(10)
        """,
        url,
    )
    assert out == "hello\n"


@pytest.mark.every_transport
@pytest.mark.parametrize(
    "body",
    [
        "asyncio.run(main())",
        "bus.blocking.start(); say('ready'); [time.sleep(0.1) for _ in range(1000)]",
        "say('ready'); next(bus.blocking.events('x'))",
    ],
)
def test_ctrl_c_ends_within_half_a_second(url: str, body: str) -> None:
    program = Program(
        f"""
        bus = Bus(URL, service="shop")
        @bus.on("z")
        def handler(event): ...
        async def main():
            async with bus:
                say("ready")
                async for event in bus.events("x"): ...
        {body}
        """,
        url,
    )
    assert program.line() == "ready"
    time.sleep(0.3)
    before = time.monotonic()
    program.process.send_signal(signal.SIGINT)
    status, _, err = program.end()
    took = time.monotonic() - before
    assert status != 0
    assert err.rstrip().endswith("KeyboardInterrupt"), err
    assert took < 0.5 + 0.5, took  # the machine may be busy: twice what is promised


@pytest.mark.parametrize("kind", ["async def", "def"])
def test_sys_exit_in_a_handler_ends_the_program(url: str, kind: str) -> None:
    program = Program(
        f"""
        bus = Bus(URL, service="shop")
        @bus.on("x")
        {kind} handler(event):
            sys.exit(3)
        async def main():
            async with bus:
                await bus.publish("x")
                await asyncio.sleep(1000)
        asyncio.run(main())
        """,
        url,
    )
    status, _, _ = program.end()
    assert status == 3


def test_one_bus_in_one_loop_after_another(url: str) -> None:
    out = run(
        """
        bus = Bus(URL, service="shop", lease=30)
        seen = []
        done = None
        @bus.on("x", concurrency=4)
        async def handler(event):
            if event.payload == "stuck" and not seen:
                seen.append(event.payload)
                await asyncio.sleep(1000)
            seen.append((event.payload, event.delivery.attempt))
            done.set()
        async def first():
            global done
            done = asyncio.Event()
            await bus.start()                       # and never closed
            await bus.publish("x", "stuck")
            while not seen:
                await asyncio.sleep(0.01)
        async def second():
            global done
            done = asyncio.Event()
            async with bus:
                await asyncio.wait_for(done.wait(), 5)
        asyncio.run(first())
        asyncio.run(second())
        say(seen)
        """,
        url,
    )
    assert out == "['stuck', ('stuck', 1)]\n" or out == "['stuck', ('stuck', 2)]\n"


def test_a_loop_closed_by_hand_hands_its_events_back(url: str) -> None:
    out = run(
        """
        bus = Bus(URL, service="shop", lease=30)
        got = asyncio.Event()
        async def handler(event):
            got.set()
            await asyncio.sleep(1000)
        async def first():
            await bus.start()
            await bus.subscribe("x", handler, name="x")
            await bus.publish("x")
            await got.wait()
        import warnings
        warnings.simplefilter("ignore")
        loop = asyncio.new_event_loop()
        loop.run_until_complete(first())
        loop.close()
        other = Bus(URL, service="shop")
        for event in other.blocking.events("x", name="x"):
            say(event.type)
            break
        """,
        url,
    )
    assert out.splitlines()[0] == "x"


def test_publish_pending_when_its_loop_closes_does_no_harm(url: str) -> None:
    run(
        """
        bus = Bus(URL, service="shop")
        async def main():
            for number in range(50):
                asyncio.ensure_future(bus.publish("x", number))
            await asyncio.sleep(0)
        for _ in range(5):
            asyncio.run(main())
        """,
        url,
    )


def test_several_loops_in_threads(url: str) -> None:
    out = run(
        """
        bus = Bus(URL, service="shop")
        seen, lock = [], threading.Lock()
        ready = threading.Barrier(4)
        def thread(number):
            async def main():
                done = asyncio.Event()
                async def handler(event):
                    with lock:
                        seen.append((number, event.payload))
                        count = sum(1 for n, _ in seen if n == number)
                    if count == 4:
                        done.set()
                await bus.subscribe("x", handler, name=f"handler-{number}")
                await asyncio.to_thread(ready.wait)
                await bus.publish("x", number)
                await asyncio.wait_for(done.wait(), 10)
            asyncio.run(main())
        threads = [threading.Thread(target=thread, args=(n,)) for n in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        say(sorted(seen) == [(n, m) for n in range(4) for m in range(4)])
        """,
        url,
    )
    assert out == "True\n"


def test_uvloop(url: str) -> None:
    pytest.importorskip("uvloop")
    out = run(
        """
        import uvloop
        bus = Bus(URL, service="shop")
        seen = []
        @bus.on("x")
        async def handler(event):
            seen.append(event.payload)
            if len(seen) == 200:
                done.set()
        async def main():
            global done
            done = asyncio.Event()
            async with bus:
                await asyncio.gather(*(bus.publish("x", n) for n in range(100)))
                await bus.publish_many([Event.create("x", n) for n in range(100, 200)])
                await asyncio.wait_for(done.wait(), 10)
        for _ in range(2):
            uvloop.run(main())
            say(sorted(seen) == list(range(200)))
            seen.clear()
        """,
        url,
    )
    assert out == "True\nTrue\n"


@pytest.mark.every_transport
def test_fork_after_use(url: str) -> None:
    """The child connects anew with the same bus object; the parent goes on."""
    out = run(
        """
        bus = Bus(URL, service="shop")
        seen = []
        @bus.on("x")
        async def handler(event):
            seen.append(event.payload)
            done.set()
        async def main(word):
            global done
            done = asyncio.Event()
            async with bus:
                await bus.publish("x", word)
                await asyncio.wait_for(done.wait(), 5)
        asyncio.run(main("parent"))
        child = os.fork()
        if child == 0:
            seen.clear()
            asyncio.run(main("child"))
            say("child", seen)
            sys.exit(0)
        _, status = os.waitpid(child, 0)
        seen.clear()
        asyncio.run(main("parent again"))
        say("parent", seen, status)
        """,
        url,
    )
    assert out == "child ['child']\nparent ['parent again'] 0\n"


@pytest.mark.every_transport
def test_fork_inside_a_running_loop(url: str) -> None:
    """Forked with handlers, threads and an open loop: the child can publish, and disturbs nothing."""
    out = run(
        """
        bus = Bus(URL, service="shop")
        seen = []
        @bus.on("x")
        def plain(event):
            seen.append(event.payload)
            loop.call_soon_threadsafe(done.set)
        async def main():
            global done, loop
            done, loop = asyncio.Event(), asyncio.get_running_loop()
            async with bus:
                await bus.publish("x", 1)
                await asyncio.wait_for(done.wait(), 5)
                done.clear()
                for _ in range(20):
                    child = os.fork()
                    if child == 0:
                        bus.blocking.publish("y", "from the child")
                        os._exit(0)  # not through the parent's loop, which is not the child's to end
                    assert os.waitpid(child, 0)[1] == 0
                await bus.publish("x", 2)
                await asyncio.wait_for(done.wait(), 5)
                say(seen, (await bus.stats())["plain"].completed)
        asyncio.run(main())
        """,
        url,
        timeout=60,
    )
    assert out == "[1, 2] 2\n"


@pytest.mark.every_transport
def test_fork_with_running_threads_and_exit_normally(url: str) -> None:
    out = run(
        """
        bus = Bus(URL, service="shop")
        seen = []
        bus.blocking.subscribe("x", lambda event: (seen.append(event.payload), done.set()), name="x")
        done = threading.Event()
        for number in range(20):
            done.clear()
            child = os.fork()
            if child == 0:
                bus.blocking.publish("y", "from the child")
                say(bus.subscriptions)
                sys.exit(0)
            bus.blocking.publish("x", number)
            assert done.wait(5)
            assert os.waitpid(child, 0)[1] == 0
        say(seen == list(range(20)))
        """,
        url,
        timeout=60,
    )
    assert out == "[]\n" * 20 + "True\n"


@pytest.mark.every_transport
def test_preload_then_fork_workers(url: str) -> None:
    """As gunicorn --preload: the parent publishes, then forks workers that share one subscription."""
    out = run(
        """
        bus = Bus(URL, service="web", lease=1.0)
        @bus.on("job.*", concurrency=4)
        def work(event):
            os.write(pipe[1], b"%d\\n" % event.payload)
        bus.blocking.publish("warm.up")
        pipe = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                with bus.blocking:
                    os.write(pipe[1], b"ready\\n")
                    signal.sigwait([signal.SIGTERM])
                sys.exit(0)
            children.append(child)
        def lines(count):
            data = b""
            while data.count(b"\\n") < count:
                data += os.read(pipe[0], 65536)
            return data.split()
        lines(3)
        bus.blocking.publish_many([Event.create("job.x", n) for n in range(300)])
        say(sorted(map(int, lines(300))) == list(range(300)))
        for child in children:
            os.kill(child, signal.SIGTERM)
        say([os.waitpid(child, 0)[1] for child in children])
        """.replace(
            "children = []", "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n        children = []"
        ),
        url,
    )
    assert out == "True\n[0, 0, 0]\n"


@pytest.mark.every_transport
def test_a_killed_process_loses_nothing(url: str) -> None:
    victim = Program(
        """
        bus = Bus(URL, service="shop", lease=1.0)
        @bus.on("x", name="x", concurrency=4)
        async def handler(event):
            say("begun", event.payload)
            await asyncio.sleep(1000)
        async def main():
            async with bus:
                await bus.publish_many([Event.create("x", n) for n in range(4)])
                await asyncio.sleep(1000)
        asyncio.run(main())
        """,
        url,
    )
    assert sorted(victim.line() for _ in range(4)) == [f"begun {n}" for n in range(4)]
    victim.process.kill()
    victim.process.communicate()
    before = time.monotonic()
    out = run(
        """
        bus = Bus(URL, service="shop", lease=1.0)
        seen = []
        for event in bus.blocking.events("x", name="x", concurrency=4):
            seen.append((event.payload, event.delivery.attempt, event.delivery.redelivered))
            if len(seen) == 4:
                break
        say(sorted(seen))
        """,
        url,
    )
    assert out == str([(n, 2, True) for n in range(4)]) + "\n"
    assert time.monotonic() - before < 2 * 1.0 + 3


def test_gil_held_for_three_leases(url: str) -> None:
    """The lease is kept by a thread of the core, which needs no GIL."""
    holder = Program(
        """
        bus = Bus(URL, service="shop", lease=1.0)
        done = threading.Event()
        def handler(event):
            import ctypes
            say("begun", event.delivery.attempt)
            ctypes.PyDLL(None).usleep(3_200_000)    # PyDLL keeps the GIL
            done.set()
        sub = bus.blocking.subscribe("x", handler, name="x", concurrency=1)
        bus.blocking.publish("x", "held")
        assert done.wait(20)
        sub.unsubscribe()
        bus.blocking.publish("x", "last")
        say("settled")
        """,
        url,
    )
    assert holder.line() == "begun 1"
    out = run(
        """
        bus = Bus(URL, service="shop", lease=1.0)
        for event in bus.blocking.events("x", name="x"):
            say(event.payload)
            if event.payload == "last":
                break
        """,
        url,
    )
    assert holder.line() == "settled"
    assert holder.end() == (0, "", "")
    assert out == "last\n"  # and not "held"


def test_cancelling_a_publish_does_not_take_it_back(url: str) -> None:
    out = run(
        """
        bus = Bus(URL, service="shop")
        async def main():
            seen = asyncio.Event()
            async def handler(event):
                seen.set()
            await bus.subscribe("x", handler)
            task = asyncio.ensure_future(bus.publish("x"))
            await asyncio.sleep(0)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                say("cancelled")
            await asyncio.wait_for(seen.wait(), 5)
            say("seen")
            await bus.close()
        asyncio.run(main())
        """,
        url,
    )
    assert out.endswith("seen\n")


def test_publish_from_many_threads(url: str) -> None:
    out = run(
        """
        bus = Bus(URL, service="shop")
        def publish(number):
            for n in range(20):
                bus.blocking.publish("x", [number, n])
        sub = bus.blocking.subscribe("x", lambda event: seen.append(tuple(event.payload)), name="x", concurrency=3)
        seen = []
        threads = [threading.Thread(target=publish, args=(n,)) for n in range(16)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        while bus.blocking.stats()["x"].pending:
            time.sleep(0.01)
        bus.blocking.close()
        say(len(seen), len(set(seen)))
        """,
        url,
    )
    assert out == "320 320\n"


def test_a_thread_whose_job_ran_too_long_is_replaced(url: str) -> None:
    out = run(
        """
        import logging
        logging.getLogger("polybus").setLevel("CRITICAL")
        bus = Bus(URL, service="shop")
        gate = threading.Event()
        seen = threading.Event()
        def handler(event):
            if event.payload == "stuck":
                gate.wait()
            else:
                seen.set()
        bus.blocking.subscribe("x", handler, name="x", concurrency=1, timeout=0.05, retry=RetryPolicy(max_retries=0))
        bus.blocking.publish("x", "stuck")
        bus.blocking.publish("x", "next")
        say(seen.wait(5))
        gate.set()
        bus.blocking.close()
        """,
        url,
    )
    assert out == "True\n"


def test_refuses_to_load_in_a_subinterpreter(url: str) -> None:
    out = run(
        """
        try:
            import _xxsubinterpreters as interpreters
        except ImportError:
            import _interpreters as interpreters
        old = sys.version_info < (3, 13)
        interpreter = interpreters.create(isolated=False) if old else interpreters.create("legacy")
        code = "try:\\n import polybus\\n print('loaded')\\nexcept ImportError as e: print(e)"
        interpreters.run_string(interpreter, code)
        """,
        url,
    )
    assert "subinterpreter" in out


def test_nothing_starts_at_import() -> None:
    out = run(
        """
        bus = Bus(URL, service="shop")
        bus.on("x", name="x")(lambda event: None)
        say(threading.active_count(), len(os.listdir("/proc/self/task")))
        """,
        "sqlite:////no/such/folder/bus.db",
    )
    assert out == "1 1\n"


def test_a_loop_without_add_reader(url: str) -> None:
    """Windows' default loop."""
    out = run(
        """
        class Loop(asyncio.SelectorEventLoop):
            def add_reader(self, *args):
                raise NotImplementedError
        bus = Bus(URL, service="shop")
        async def main():
            seen = []
            done = asyncio.Event()
            async def handler(event):
                seen.append(event.payload)
                if len(seen) == 50:
                    done.set()
            async with bus:
                await bus.subscribe("x", handler, name="x")
                for number in range(50):
                    await bus.publish("x", number)
                await asyncio.wait_for(done.wait(), 10)
            say(seen == list(range(50)))
        loop = Loop()
        loop.run_until_complete(main())
        loop.close()
        """,
        url,
    )
    assert out == "True\n"


def test_a_kept_traceback_does_not_keep_a_closed_loop_subscribed(url: str) -> None:
    out = run(
        """
        bus = Bus(URL, service="shop", lease=30)
        got = asyncio.Event()
        async def handler(event):
            got.set()
            await asyncio.sleep(1000)
        async def first():
            await bus.start()
            await bus.subscribe("x", handler, name="x")
            await bus.publish("x")
            await got.wait()
            await bus.dead_letters.get("none")
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(first())
        except NotFound as error:
            kept = error
        loop.close()
        del loop
        other = Bus(URL, service="shop")
        for event in other.blocking.events("x", name="x"):
            say(event.type)
            break
        """,
        url,
    )
    assert out == "x\n"

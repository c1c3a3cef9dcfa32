"""The store behind PgBouncer in transaction mode, where a session of the server is a client's for one transaction only."""

import os
import threading
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy
from support.agent import RunningAgent
from support.pgbouncer import Bouncer
from support.postgres import Cluster
from support.records import fill, opened
from support.rotatable_agent import RotatableAgent
from support.skip_unless import pgbouncer, postgresql
from test_store import NEW, blob, record

from keyferry.store import Store, rewrap

THREADS, ADDED = 6, 20


@pytest.fixture
def bouncer(postgres: Cluster) -> Iterator[Bouncer]:
    """A PgBouncer of a test's own."""
    with Bouncer(postgres) as running:
        yield running


def together(count: int, work: Callable[[int], None]) -> list[BaseException]:
    """Run a function in several threads, with the number of each; return the exceptions."""
    failures: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait()
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


@pgbouncer()
def test_threads_share_a_store_behind_a_pooler(bouncer: Bouncer, postgres: Cluster) -> None:
    """More threads than sessions run long enough for prepared statements; the first ones create the table."""
    url = bouncer.url(postgres.new_database())
    with Store(url) as store:

        def work(thread: int) -> None:
            for number in range(ADDED):
                name = f"{thread}-{number}"
                store.check_free(name)
                store.add(record(name))
                assert store.replace([(store.get(name), blob(NEW), NEW)]) == 1
            assert store.count() >= ADDED
            assert len(list(store)) >= ADDED

        assert together(THREADS, work) == []
        assert store.count() == THREADS * ADDED
        assert {each.key_version_id for each in store} == {NEW}


@pgbouncer()
def test_stores_of_several_processes_share_a_pooler(bouncer: Bouncer, postgres: Cluster) -> None:
    """The processes' connections have the same numbers."""
    url = bouncer.url(postgres.new_database())

    def work(thread: int) -> None:
        with Store(url) as store:
            for number in range(ADDED):
                store.add(record(f"{thread}-{number}"))
                store.get(f"{thread}-{number}")

    assert together(THREADS, work) == []


@pgbouncer()
def test_a_rewrap_runs_behind_a_pooler(bouncer: Bouncer, postgres: Cluster, rotatable_agent: RotatableAgent) -> None:
    """A rewrap moves every record, and its data key stays the same."""
    with Store(bouncer.url(postgres.new_database())) as store, rotatable_agent.agent.client() as kms:
        keys = fill(store, kms, 60)
        rotatable_agent.rotate()
        assert rewrap(store, kms).moved == 60
        assert rewrap(store, kms).found == 0
        assert opened(store, kms) == keys


@pgbouncer()
def test_the_first_call_after_a_restart_behind_a_pooler_works(bouncer: Bouncer, postgres: Cluster) -> None:
    """The pooler, the server or both restart."""
    with Store(bouncer.url(postgres.new_database())) as store:
        store.add(record("a"))
        bouncer.restart()
        assert store.get("a").name == "a"
        postgres.stop()
        postgres.start()
        store.add(record("b"))
        postgres.stop()
        postgres.start()
        bouncer.restart()
        assert [each.name for each in store] == ["a", "b"]


@postgresql()
def test_the_first_call_after_a_restart_works(postgres: Cluster) -> None:
    """The server, or an administrator, closed the idle connections of the pool."""
    url = postgres.new_database()
    with Store(url) as store, Store(url) as other:
        store.add(record("a"))
        assert other.get("a").name == "a"
        postgres.stop()
        postgres.start()
        store.add(record("b"))
        assert other.count() == 2
        with store._engine.begin() as connection:
            connection.execute(
                sqlalchemy.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
            )
        assert other.replace([(other.get("a"), blob(NEW), NEW)]) == 1


@postgresql()
def test_connection_keeps_no_state_between_calls(postgres: Cluster, agent: RunningAgent) -> None:
    """Repeated calls of every kind leave no prepared statement, lock or session setting."""
    with Store(postgres.new_database()) as store:
        for number in range(12):
            store.add(record(f"{number}"))
            store.replace([(each, blob(NEW), NEW) for each in store])
            store.count("a-key", not_under=NEW)
            store.key_ids()
            list(store.not_under("a-key", NEW))
        with store._engine.begin() as connection:
            for query in (
                "SELECT name FROM pg_prepared_statements",
                "SELECT objid FROM pg_locks WHERE locktype = 'advisory'",
                "SELECT name FROM pg_settings WHERE source = 'session'",
                "SELECT channel FROM pg_listening_channels() AS channel",
            ):
                assert connection.execute(sqlalchemy.text(query)).all() == [], query


@postgresql()
def test_a_child_does_not_use_its_parents_connections(postgres: Cluster) -> None:
    """After a fork, parent and child use the store on connections of their own."""
    with Store(postgres.new_database()) as store:
        store.add(record("a"))
        backend = sqlalchemy.text("SELECT pg_backend_pid()")
        with store._engine.connect() as connection:
            parents = connection.execute(backend).scalar_one()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                store.add(record("b"))
                with store._engine.connect() as connection:
                    code = 2 if connection.execute(backend).scalar_one() == parents else 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert [each.name for each in store] == ["a", "b"]

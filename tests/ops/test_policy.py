"""The scaling decision: the formula, every limit, every reason, and what holds for all inputs."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.scaler.memory import from_json, to_json
from infra.scaler.policy import Machine, MachineState, Memory, Policy, Seen, decide, nodes_for, order_failed

S = MachineState
POLICY = Policy(target_wait=300, max_nodes=10, price_per_hour=20, job_seconds=100, remove_window=600)


def fleet(count: int, state: S = S.SERVING, **changes: object) -> tuple[Machine, ...]:
    machines = (Machine(f"{state}-{place}", state, since=float(place), price=20) for place in range(count))
    return tuple(replace(machine, **changes) for machine in machines)  # type: ignore[arg-type]


def seen(waiting: int, running: int, machines: tuple[Machine, ...] = (), now: float = 1000.0) -> Seen:
    return Seen(now, waiting, running, 100.0, machines)


def test_formula_by_hand() -> None:
    # 7 jobs of 100 s within 300 s: 2.33 nodes' work, so 3 nodes
    assert nodes_for(7, 100, 300) == 3
    assert nodes_for(0, 100, 300) == 0
    assert nodes_for(6, 100, 300) == 2
    decision = decide(POLICY, seen(5, 2), Memory())
    assert (decision.desired, decision.target, decision.add) == (3, 3, 3)
    assert decision.reasons[0] == "(5 waiting + 2 running) x 100.0 s (measured) / 300 s -> 3 nodes"


def test_unmeasured_jobs_take_the_assumed_time() -> None:
    decision = decide(POLICY, replace(seen(3, 0), job_seconds=None), Memory())
    assert decision.desired == 1
    assert "(assumed)" in decision.reasons[0]


def test_limits() -> None:
    assert decide(replace(POLICY, min_nodes=2), seen(0, 0), Memory()).add == 2
    cut = decide(replace(POLICY, max_nodes=4), seen(100, 0), Memory())
    assert (cut.desired, cut.target) == (34, 4)
    assert "cut to 4: max_nodes" in cut.reasons
    poor = decide(replace(POLICY, budget_per_hour=70, min_nodes=4), seen(100, 0), Memory())
    assert poor.target == poor.add == 3  # 70 buys three at 20, and wins over min_nodes
    assert any("70 an hour buys no more" in reason for reason in poor.reasons)


def test_budget_counts_what_machines_really_cost_and_draining_ones_too() -> None:
    policy = replace(POLICY, budget_per_hour=100)
    dear = fleet(2, price=30.0)
    leaving = tuple(
        replace(machine, name=f"x-{machine.name}", state=S.DRAINING) for machine in fleet(1, price=30.0)
    )
    decision = decide(policy, seen(100, 0, dear + leaving), Memory())
    assert decision.target == 2  # 30 + 30 + 30 leave 10: no more at 20
    assert decision.add == 0


def test_a_cut_budget_drains_at_once_and_the_dearest_first() -> None:
    machines = (*fleet(2), replace(fleet(1)[0], name="dear", price=60.0))
    decision = decide(replace(POLICY, budget_per_hour=45), seen(100, 0, machines), Memory())
    assert decision.drain == ("dear",)


def test_the_budget_wins_over_min_nodes_and_over_an_earlier_peak() -> None:
    poor = replace(POLICY, budget_per_hour=45, min_nodes=3)
    assert decide(poor, seen(0, 0), Memory()).add == 2
    rich = decide(POLICY, seen(9, 3, fleet(4)), Memory())
    cut = decide(replace(POLICY, budget_per_hour=45), seen(9, 3, fleet(4), now=1030), rich.memory)
    assert len(cut.drain) == 2, "four were wanted half a minute ago, and two can be paid"


def test_nodes_that_still_drain_take_the_place_of_new_ones() -> None:
    machines = tuple(replace(m, name=f"x-{m.name}", state=S.DRAINING) for m in fleet(4))
    decision = decide(replace(POLICY, max_nodes=5), seen(100, 0, machines), Memory())
    assert (decision.target, decision.add) == (5, 1)


def test_cooldown_between_orders_and_size_of_an_order() -> None:
    first = decide(replace(POLICY, max_add=2), seen(30, 0), Memory())
    assert first.add == 2
    soon = decide(POLICY, seen(30, 0, fleet(2, S.STARTING), now=1030), first.memory)
    assert soon.add == 0
    assert any("next one in 30 s" in reason for reason in soon.reasons)
    later = decide(POLICY, seen(30, 0, fleet(2, S.STARTING), now=1060), first.memory)
    assert later.add == 8


def test_nodes_stay_until_nobody_wanted_them_for_the_window() -> None:
    busy = decide(POLICY, seen(9, 3, fleet(4)), Memory())
    assert (busy.add, busy.drain) == (0, ())
    quiet = decide(POLICY, seen(0, 0, fleet(4), now=1500), busy.memory)
    assert quiet.drain == ()
    assert any("keep them" in reason for reason in quiet.reasons)
    rest = decide(POLICY, seen(3, 0, fleet(4), now=1601), quiet.memory)
    assert len(rest.drain) == 3


def test_a_peak_of_one_node_more_counts_as_well() -> None:
    before = decide(POLICY, seen(9, 3, fleet(4)), Memory())
    less = decide(POLICY, seen(6, 3, fleet(4), now=1300), before.memory)
    assert (less.target, less.drain) == (3, ())
    assert len(decide(POLICY, seen(6, 3, fleet(4), now=1601), less.memory).drain) == 1


def test_the_budget_is_for_this_scalers_own_machines() -> None:
    """Another's are paid for by others, whatever they cost."""
    policy = replace(POLICY, budget_per_hour=45)
    decision = decide(policy, seen(100, 0, fleet(3, managed=False, price=99.0)), Memory())
    assert (decision.target, decision.add) == (5, 2)
    own = tuple(replace(machine, name=f"own-{machine.name}") for machine in fleet(3))
    decision = decide(policy, seen(100, 0, (*own, *fleet(3, managed=False, price=99.0))), Memory())
    assert (decision.target, len(decision.drain)) == (5, 1)


def test_who_goes_first() -> None:
    machines = (
        Machine("busy", S.SERVING, busy=True, since=1, price=20),
        Machine("idle", S.SERVING, since=1, price=20),
        Machine("dear", S.SERVING, since=1, price=40),
        Machine("young", S.SERVING, since=5, price=20),
        Machine("starting", S.STARTING, since=900, price=20),
    )
    order = [
        decide(replace(POLICY, max_nodes=keep), seen(99, 1, machines), Memory()).drain for keep in range(5)
    ]
    assert order[0] == ("starting", "dear", "young", "idle", "busy")
    assert order[3] == ("starting", "dear")


def test_only_drained_and_lost_machines_are_removed() -> None:
    machines = tuple(Machine(state.value, state, since=900) for state in S)
    assert decide(POLICY, seen(0, 0, machines), Memory()).remove == ("drained", "gone")


def test_fixed_nodes_count_but_are_never_touched() -> None:
    machines = fleet(3, managed=False)
    assert decide(POLICY, seen(9, 0, machines), Memory()).add == 0
    decision = decide(POLICY, seen(0, 0, machines), Memory())
    assert decision.drain == decision.remove == ()
    assert any("none of them is this scaler's" in reason for reason in decision.reasons)


def test_silence_is_borne_for_a_while() -> None:
    machines = (Machine("quiet", S.SILENT),)
    first = decide(POLICY, seen(1, 0, machines), Memory(served=("quiet",)))
    assert first.remove == ()
    assert first.capacity == 1
    second = decide(POLICY, seen(1, 0, machines, now=1181), first.memory)
    assert second.remove == ("quiet",)
    assert second.add == 1
    assert first.memory.served == ("quiet",), "forgotten, it would count as one that never came up"
    assert decide(POLICY, seen(1, 0, ()), first.memory).memory.served == ()


def test_a_drain_is_remembered_as_long_as_its_machine_is_there() -> None:
    """It is asked again at every pass, and a removal may fail; what is gone must not be asked for ever."""
    memory = Memory(drains=(("here", 1.0), ("gone", 1.0)))
    later = decide(POLICY, seen(1, 0, (Machine("here", S.DRAINED),)), memory).memory
    assert later.drains == (("here", 1.0),)


def test_a_machine_that_never_serves_is_given_up_and_the_next_order_waits() -> None:
    memory = Memory(orders=(("stuck", 1.0),))
    decision = decide(POLICY, seen(1, 0, (Machine("stuck", S.STARTING, since=1.0),), now=1202), memory)
    assert decision.remove == ("stuck",)
    assert decision.memory.orders == ()
    assert decision.memory.failed_orders == 1
    assert decision.add == 0
    assert decide(POLICY, seen(1, 0, (), now=1263), decision.memory).add == 1


def test_back_off_doubles_has_a_limit_and_ends_with_a_node_that_serves() -> None:
    memory, pauses = Memory(), []
    for _ in range(8):
        memory, _text = order_failed(POLICY, memory, 0.0, "none in stock")
        pauses.append(memory.no_orders_until)
    assert pauses == [60, 120, 240, 480, 960, 1800, 1800, 1800]
    after = decide(POLICY, seen(3, 0, fleet(1)), memory).memory
    assert after.failed_orders == 0
    assert after.no_orders_until == 0


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"target_wait": 0}, "target_wait"),
        ({"min_nodes": -1}, "min_nodes"),
        ({"min_nodes": 11}, "max_nodes"),
        ({"budget_per_hour": 5.0, "price_per_hour": 0}, "price_per_hour"),
        ({"job_seconds": 0}, "job_seconds"),
        ({"max_add": 0}, "max_add"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, float], word: str) -> None:
    with pytest.raises(ValueError, match=rf"{word}: got .*expected"):
        replace(POLICY, **changes)  # type: ignore[arg-type]


names = st.text("abc", min_size=1, max_size=3)
times = st.floats(0, 5000)
machines = st.lists(
    st.builds(
        Machine,
        name=names,
        state=st.sampled_from(S),
        busy=st.booleans(),
        since=times,
        price=st.sampled_from([10.0, 20.0, 31.5]),
        managed=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda machine: machine.name,
).map(tuple)
pairs = st.lists(st.tuples(names, times), max_size=4).map(tuple)
memories = st.builds(
    Memory,
    added_at=st.none() | times,
    wanted=st.lists(st.tuples(times, st.integers(0, 12)), max_size=4).map(tuple),
    failed_orders=st.integers(0, 40),
    no_orders_until=times,
    orders=pairs,
    drains=pairs,
    silent=pairs,
    served=st.lists(names, max_size=4).map(tuple),
)
policies = st.builds(
    Policy,
    target_wait=st.floats(10, 1000),
    min_nodes=st.integers(0, 3),
    max_nodes=st.integers(3, 12),
    price_per_hour=st.sampled_from([10.0, 20.0]),
    budget_per_hour=st.none() | st.floats(0, 200),
    max_add=st.integers(1, 5),
)
sights = st.builds(
    Seen,
    now=times,
    waiting=st.integers(0, 500),
    running=st.integers(0, 20),
    job_seconds=st.none() | st.floats(1, 500),
    machines=machines,
)


@given(policies, sights, memories)
def test_what_holds_always(policy: Policy, sight: Seen, memory: Memory) -> None:
    decision = decide(policy, sight, memory)
    by_name = {machine.name: machine for machine in sight.machines}
    managed = [m for m in sight.machines if m.managed and m.name not in decision.remove]
    assert decision == decide(policy, sight, memory)
    assert 0 <= decision.target <= policy.max_nodes
    assert not (decision.add and decision.drain)
    assert len(managed) + decision.add <= max(policy.max_nodes, len(managed))
    assert decision.add <= policy.max_add
    for name in decision.drain:  # only its own, and only what serves or will
        assert by_name[name].managed
        assert by_name[name].state in (S.SERVING, S.STARTING, S.SILENT)
    for name in decision.remove:  # never one whose node is at work
        assert by_name[name].managed
        assert by_name[name].state not in (S.SERVING, S.DRAINING)
    assert decision.capacity - len(decision.drain) >= min(decision.target, decision.capacity)
    if policy.budget_per_hour is not None and decision.add:
        kept = sum(machine.price for machine in managed)
        assert kept + decision.add * policy.price_per_hour <= policy.budget_per_hour + 1e-6
    assert decision.reasons
    assert from_json(to_json(decision.memory)) == decision.memory  # a restarted scaler decides the same


@given(policies, sights, memories, st.integers(1, 200))
def test_more_jobs_never_want_fewer_nodes(policy: Policy, sight: Seen, memory: Memory, more: int) -> None:
    fewer, later = sight, replace(sight, waiting=sight.waiting + more)
    assert decide(policy, later, memory).target >= decide(policy, fewer, memory).target
    assert len(decide(policy, later, memory).drain) <= len(decide(policy, fewer, memory).drain)


@given(policies, sights)
def test_a_fleet_that_obeys_comes_to_rest(policy: Policy, sight: Seen) -> None:
    """Constant load, every order served and every drain obeyed: soon nothing is left to do."""
    memory, fleet_now, now = Memory(), sight.machines, sight.now
    for turn in range(40):
        decision = decide(policy, replace(sight, now=now, machines=fleet_now), memory)
        left = {m.name: m for m in fleet_now if m.name not in decision.remove}
        for name, machine in left.items():
            if name in decision.drain or machine.state is S.DRAINING:
                left[name] = replace(machine, state=S.DRAINED)
            elif machine.state in (S.STARTING, S.SILENT):
                left[name] = replace(machine, state=S.SERVING)
        for place in range(decision.add):
            left[f"new{turn}-{place}"] = Machine(
                f"new{turn}-{place}", S.STARTING, since=now, price=policy.price_per_hour
            )
        memory, fleet_now, now = decision.memory, tuple(left.values()), now + policy.remove_window / 2
    last = decide(policy, replace(sight, now=now, machines=fleet_now), memory)
    assert (last.add, last.drain, last.remove) == (0, (), ())

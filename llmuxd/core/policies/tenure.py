"""`tenure`: a model keeps its turn while that is worth more than a switch; the one with the most waiting is next."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmuxd.core.policy import Candidate, Decision, ModelView, PolicyParameters, Snapshot, Stay, SwitchTo

_MOST = 2.0
_LOOK_SECS = 0.5
"""How soon the rates are compared again if nothing happens."""
_MOST_BARREN = 6


@dataclass(frozen=True, slots=True)
class Tenure:
    """The default. Little waiting for little switching, and a bound on every wait.

    An awake model has a turn, and is not switched out before it is over. C is the measured cost of the switch to the
    candidate, in seconds, and n how many requests are in flight at the awake model.

    Where they can be parked, the turn lasts `least_costs` x C + `park_secs` x n at least: the latter pays for the KV
    caches that have to be computed again. From then on two rates are compared, both in first tokens and answers per
    second. Staying is worth `stay_weight` x (n / A + `arrival_weight` x the rate at which requests come), A being how
    long the model's answers take on the average. Going is worth what a visit to the candidate brings, over the time it
    takes: C for the switch, and V = `visit_costs` x C + `visit_answers` x its A. That is a first token for each queued
    request, an answer before V is over with probability 1 - exp(-V/A) for each queued and `parked_share` of each
    parked one, and `stood_weight` more for each C + V that a parked one has stood still. Both are weighed by priority.
    The turn is over when going is worth more. So a few stragglers are finished as long as little waits elsewhere, and
    a batch that is nearly done is not kept for long once much does.

    Where they cannot be parked, the switch has to wait for them. The turn lasts `drain_stretch` x `turn_costs` x C x
    clamp((n + those expected to arrive within C) / those queued for the candidate, 1, 2) + `secs_per_request` x n. A
    candidate that has only parked requests waits `parked_costs` x C instead of the clamped term.

    Turns that end without a single answer double the model's next one, so that long prompts and slow machines make
    progress, too. A model with nothing in flight and nothing queued has no turn left; only for `linger_costs` x C
    after its last request came it is left alone, because the next often follows closely.

    1. Overdue is a candidate whose longest wait is beyond `max_wait` + `overdue_costs` x the typical cost of a switch.
       If there are any, the one that waits longest is next, when the turn of what is in its way is over: rates are
       compared for no longer than the first `overdue_turn` of it, and at `longest_turn` it ends in any case.
    2. Otherwise, of the candidates for which the turn is over, the one with the largest waiting time, summed over its
       requests and weighed by its priority, is next; a request that has seen nothing yet counts `queued_costs` x C
       more, a parked one `paused_costs` x C.
    3. A model that has requests queued at a full engine (`max_in_flight`) is left alone: each of them would have to
       wait for two switches. Only when the next of them came after a candidate became overdue they do not count any
       more: urgent ones that keep coming, in front of older ones, would keep the candidate waiting as well.
    4. Before what is in flight is parked, it is given `finish_costs` x C if it will be answered within that; and
       `door_answers` x A, nothing new being forwarded, if those in flight would be away (C for each model that waits)
       for longer, summed, than `door_weight` x A for each request that waits elsewhere (`parked_weight` for a parked
       one).

    A pause inside a stream is a wait as any other: it counts from the parking of the request, is overdue after the
    same time, and ends after one more turn, the switch, and those of models that have waited even longer.

    Sources: gated and time-limited service of queues with switchover costs (Takagi, Analysis of Polling Systems,
    1986); serve what brings most per second, the setup included (Duenyas and Van Oyen, Heuristic scheduling of
    parallel heterogeneous queues with set-ups, 1996); serve the longest waiting line (Liu, Nain, Towsley 1992); tenure
    that grows with the queue (Celik, Borst, Whiting, Modiano 2016); a quota per model from the switching times, with
    requests paused (Aegaeon, SOSP 2025). The constants were chosen by the comparison in docs/policies.md.
    """

    max_wait: float = 15.0
    """Seconds."""
    least_costs: float = 0.542
    park_secs: float = 0.335
    """Seconds of turn per request in flight that can be parked."""
    visit_costs: float = 0.855
    visit_answers: float = 1.89
    parked_share: float = 0.325
    stood_weight: float = 0.5
    stay_weight: float = 0.86
    arrival_weight: float = 1.07
    turn_costs: float = 2.5
    parked_costs: float = 30.0
    drain_stretch: float = 1.3
    secs_per_request: float = 0.2
    """Seconds of turn per request in flight that cannot be parked."""
    queued_costs: float = 6.4
    paused_costs: float = 2.0
    overdue_costs: float = 19.0
    finish_costs: float = 0.32
    door_answers: float = 0.83
    door_weight: float = 1.05
    parked_weight: float = 0.22
    overdue_turn: float = 20.0
    """Seconds, once something is overdue, as is the next."""
    longest_turn: float = 100.0
    linger_costs: float = 0.02
    name: str = "tenure"

    @classmethod
    def build(cls, parameters: PolicyParameters) -> Tenure:
        return cls(max_wait=parameters.max_wait)

    def bound(self, typical_switch_secs: float) -> float:
        return self.max_wait + self.overdue_costs * typical_switch_secs

    def decide(self, snapshot: Snapshot) -> Decision:
        now = snapshot.now
        candidates = self._overdue(snapshot) or snapshot.candidates
        best: tuple[float, ModelView, Candidate] | None = None
        soonest = math.inf
        for model, candidate in candidates:
            ready = self._ready_at(snapshot, model, candidate)
            if ready > now:
                soonest = min(soonest, ready)
                continue
            index = self._index(model, candidate)
            if best is None or index > best[0]:
                best = (index, model, candidate)
        if best is None:
            return Stay(soonest if soonest < math.inf else None)
        _, model, candidate = best
        return SwitchTo(model.name, drain_secs=self._finish_secs(snapshot, candidate))

    def _index(self, model: ModelView, candidate: Candidate) -> float:
        """How much waits for the model, in seconds."""
        extra = self.queued_costs * model.queued + self.paused_costs * model.parked
        return model.priority * (model.waiting_secs + candidate.switch_secs * extra)

    def _finish_secs(self, snapshot: Snapshot, candidate: Candidate) -> float:
        """How long the victims may go on with what they have in flight before it is parked."""
        victims = snapshot.victims(candidate)
        least = self.finish_costs * candidate.switch_secs
        needed = max((victim.drain_secs for victim in victims), default=0.0)
        finish = least if needed <= least else 0.0
        waiting = [model for model, _ in snapshot.candidates]
        away = len(waiting) * candidate.switch_secs
        held_up = sum(model.queued + self.parked_weight * model.parked for model in waiting)
        for victim in victims:
            if victim.in_flight * away > self.door_weight * held_up * victim.answer_secs:
                finish = max(finish, self.door_answers * victim.answer_secs)
        return finish

    def _overdue(self, snapshot: Snapshot) -> list[tuple[ModelView, Candidate]]:
        """The candidate that has waited longest, if it is overdue."""
        overdue = [
            (model.oldest_arrival, number)
            for number, (model, _) in enumerate(snapshot.candidates)
            if model.oldest_arrival is not None
            and snapshot.now >= model.oldest_arrival + self.bound(snapshot.typical_switch_secs)
        ]
        return [snapshot.candidates[min(overdue)[1]]] if overdue else []

    def _ready_at(self, snapshot: Snapshot, model: ModelView, candidate: Candidate) -> float:
        """When nothing that is in the candidate's way has a turn left."""
        overdue_at = (model.oldest_arrival or 0.0) + self.bound(snapshot.typical_switch_secs)
        overdue = overdue_at <= snapshot.now
        ready = snapshot.now
        stays = 0.0
        for victim in snapshot.victims(candidate):
            if victim.queued and (victim.next_arrival or 0.0) < overdue_at:
                return math.inf if overdue else overdue_at
            ready = max(ready, victim.since + snapshot.min_active)
            if victim.in_flight or victim.queued:
                turn = self._least_turn(victim, candidate) if victim.parks else self._turn(victim, model, candidate)
                turn *= 2.0 ** min(victim.barren_turns, _MOST_BARREN)
                ready = max(ready, victim.since + (min(turn, self.longest_turn) if overdue else turn))
                if victim.parks and not (overdue and snapshot.now >= victim.since + self.overdue_turn):
                    stays += self._worth_staying(victim)
            else:
                ready = max(ready, victim.last_arrival + self.linger_costs * candidate.switch_secs)
        if ready <= snapshot.now and stays and self._worth_going(snapshot, model, candidate) <= stays:
            return snapshot.now + _LOOK_SECS
        return ready

    def _least_turn(self, victim: ModelView, candidate: Candidate) -> float:
        """Of a model that can park: what it has in any case."""
        return self.least_costs * candidate.switch_secs + self.park_secs * victim.in_flight

    def _worth_staying(self, victim: ModelView) -> float:
        """Answers, and first tokens to those who come, per second."""
        rate = victim.in_flight / victim.answer_secs + self.arrival_weight * victim.arrival_rate
        return self.stay_weight * victim.priority * rate

    def _worth_going(self, snapshot: Snapshot, model: ModelView, candidate: Candidate) -> float:
        """First tokens and answers per second of a visit to the candidate, the switch included."""
        visit = self.visit_costs * candidate.switch_secs + self.visit_answers * model.answer_secs
        spent = candidate.switch_secs + visit
        answers = 1.0 - math.exp(-visit / model.answer_secs)
        stood = model.parked * max(0.0, snapshot.now - model.parked_since)
        brings = model.queued + answers * (model.queued + self.parked_share * model.parked)
        return model.priority * (brings + self.stood_weight * stood / spent) / spent

    def _turn(self, victim: ModelView, model: ModelView, candidate: Candidate) -> float:
        """Of a model that cannot park."""
        if model.queued:
            held_up = victim.in_flight + victim.arrival_rate * candidate.switch_secs
            factor = self.turn_costs * min(_MOST, max(1.0, held_up / model.queued))
        else:
            factor = self.parked_costs
        return self.drain_stretch * factor * candidate.switch_secs + self.secs_per_request * victim.in_flight

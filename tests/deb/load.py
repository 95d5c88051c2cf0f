#!/usr/bin/python3
"""Clients of every kind against port 3000, until a file appears: `load.py STOP_FILE`. Prints what became of each request.

Runs inside the machine, which has nothing but Python. One line of JSON for each request, when all are done.
"""

import http.client
import json
import os
import sys
import threading
import time

STOP_FILE = sys.argv[1]
TIMEOUT_SECS = 60
TOKENS = 20
"""At 50 a second: four tenths of a second for an answer."""

LEAST = 4
"""So many answers each client gets, at least."""

outcomes = []


def ask(model, stream):
    """One request on a connection of its own; what became of it."""
    began = time.time()
    connection = http.client.HTTPConnection("127.0.0.1", 3000, timeout=TIMEOUT_SECS)
    body = json.dumps({"model": model, "prompt": "x", "max_tokens": TOKENS, "stream": stream})
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
        whole = not stream or text.rstrip().endswith("data: [DONE]")
        outcome = (
            "ok" if answer.status == 200 and whole else "cut" if answer.status == 200 else f"status {answer.status}"
        )
        detail = "" if outcome == "ok" else text[-300:]
    except ConnectionRefusedError as error:
        outcome, detail = "refused", repr(error)
    except (OSError, http.client.HTTPException) as error:
        outcome, detail = "cut", repr(error)
    finally:
        connection.close()
    kind = "stream" if stream else "post"
    outcomes.append(
        {"kind": kind, "model": model, "began": began, "ended": time.time(), "outcome": outcome, "detail": detail}
    )
    return outcome


def go_on(models, stream):
    number = answers = 0
    while answers < LEAST or not os.path.exists(STOP_FILE):
        answers += ask(models[number % len(models)], stream) == "ok"
        number += 1


CLIENTS = [("a", False), ("a", False), ("a", True), ("a", True), ("aaab", False), ("b", True)]
threads = [threading.Thread(target=go_on, args=client) for client in CLIENTS]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for outcome in outcomes:
    print(json.dumps(outcome))

"""Holdfast from Python, with redis-py: `pip install redis && python example.py` after `make run`. An argument is another port."""

import sys
import uuid

import redis

MAY_BE_RETRIED = (redis.ConnectionError, redis.TimeoutError, redis.exceptions.TryAgainError)


def change(client, *command):
    """Sends a change, and returns its outcome: element 0 tells which. Every try carries the same REQUEST, so that there is one effect at
    most, also where redis-py itself sends it again."""
    request = str(uuid.uuid4())
    last = None
    for _ in range(5):
        try:
            return client.execute_command(*command, "REQUEST", request)
        except redis.AuthenticationError:
            # A ConnectionError, too, but no try will be better.
            raise
        except MAY_BE_RETRIED as error:
            last = error
        except redis.ResponseError as error:
            if not str(error).startswith("INDOUBT "):
                raise
            last = error
    raise RuntimeError(f"{command[0]} was not answered: ask again with REQUEST {request}") from last


def main():
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 6380
    with redis.Redis(port=port, decode_responses=True) as client:
        change(client, "STOCK.SET", "python-mug", 10)
        sold = change(client, "STOCK.DECR", "python-mug", 3)
        print(*sold[:2])  # OK 7
        # A refusal is a reply, not an error.
        refusal = change(client, "STOCK.DECR", "python-mug", 8)
        print(*refusal)  # INSUFFICIENT python-mug 7
    assert (sold[:2], refusal) == (["OK", 7], ["INSUFFICIENT", "python-mug", 7]), (sold, refusal)


main()

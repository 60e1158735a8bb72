"""A conversation of 10,000 tokens in 1,024 slots: facts amid a book, asked for at its end.

Run it with `python examples/long_trajectory.py`; about ten seconds on two cores.
"""

from __future__ import annotations

from importlib.resources import files

from still_agent import Agent, Budget, Compaction

FACTS = {
    "My sister Ana lives in Porto.": "Where does my sister live?",
    "Remember that Brenda's locker code is 4417.": "What is Brenda's locker code?",
    "My uncle Karl lives in Turin.": "Where does my uncle live?",
    "Remember that Oscar's gate code is 9052.": "What is Oscar's gate code?",
}


def told(event: Compaction) -> None:
    print(f"  {event.slots_before} slots became {event.slots_after} (round {event.rounds})")


def main() -> None:
    book = files("still_agent").joinpath("reference/books/wizard_of_oz.txt").read_text("utf-8")
    budget = Budget(slots=1024)
    with Agent.load("reference", budget=budget, on_compaction=told) as agent:
        chat = agent.session("long")
        for n, fact in enumerate(FACTS):
            chat.send(fact)
            chat.read(book[8_000 * n : 8_000 * (n + 1)])
            print(f"{chat.stats.logical_tokens:,} tokens told, {chat.stats.slots:,} slots held")
        for question in FACTS.values():
            print(question, chat.send(question).text)
        stats = chat.stats
        share = stats.held_bytes / stats.full_bytes
        print(f"memory held: {share:.0%} of a full cache of {stats.logical_tokens:,} tokens")


if __name__ == "__main__":
    main()

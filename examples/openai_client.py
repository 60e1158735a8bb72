"""OpenAI's own client on a server of one's own: it keeps what it is told, and reads it once.

Run it with `python examples/openai_client.py`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from openai import OpenAI


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "memory.db")
        serve = [sys.executable, "-m", "still_agent", "serve", "--store", store, "--port", "0"]
        with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            print(line := server.stdout.readline().strip())
            try:
                talk(OpenAI(base_url=line.split()[2].rstrip(","), api_key="none"))
            finally:
                server.terminate()


def talk(client: OpenAI) -> None:
    messages = [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "Remember that Brenda's locker code is 4417."},
    ]
    for question in (None, "What is Brenda's locker code?"):
        if question is not None:
            messages.append({"role": "user", "content": question})
        reply = client.chat.completions.create(
            model="reference", messages=messages, extra_body={"session_id": "alice"}
        )
        messages.append({"role": "assistant", "content": reply.choices[0].message.content})
        print(reply.choices[0].message.content)
        cached = reply.usage.prompt_tokens_details.cached_tokens
        print(f"  {cached} of {reply.usage.prompt_tokens} tokens were already there")


if __name__ == "__main__":
    main()

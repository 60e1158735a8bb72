"""`python -m still_agent` is `still-agent`."""

from still_agent.cli.app import main

main()

"""LangChain and LangGraph speak to an agent."""

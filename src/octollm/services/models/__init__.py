"""The only holder of provider keys: chat completions in the OpenAI protocol, budgeted and journaled by task.

It decides who may use how much before a call and accounts for it after, however it ended. How a provider is spoken
to belongs to ``octollm.llm``.
"""

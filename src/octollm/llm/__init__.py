"""What calls providers: the chat completions wire, the embedded model and its catalogue, OpenAI-compatible servers.

Each module stands alone: import the one that is wanted, so that a service without a model pays for none.
No HTTP service, budget, journal or retry belongs here; the models service builds those on top.
"""

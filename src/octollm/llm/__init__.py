"""Language models: chat types, the embedded model with its catalogue and cache, and OpenAI-compatible servers.

Import the module that you need: a service without a model then loads none of them. Budgets, journals, retries and
the HTTP service belong to the models service, which is built on this package.
"""

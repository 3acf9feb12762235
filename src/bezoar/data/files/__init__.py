"""Files that others wrote, read within bounds.

Everything that handles hostile input is in this folder: whoever audits it has to read nothing else.
Nothing is ever unpickled, no header is trusted before its claims were compared with what is stored,
and every allocation has a bound. The folder imports nothing of bezoar but `errors`.
"""

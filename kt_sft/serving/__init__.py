"""One small server for a trained model, and a client that measures any server of its kind. docs/serving.md

turns engine who computes when: a queue in order of arrival, then turns of one token
text         token ids to text, stop strings
access       key, Host, Origin;  connection  time limits;  bodies, intake  from bytes to tokens;  limits  the numbers
app          the application: errors;  openai_*, ollama_*  the routes of the two protocols
server cli   the process: socket, signals, commands
bench_*      `kt-sft bench serve`
"""

"""The command lines of launch/ and tokenizer/: arguments, messages, exit codes, Ctrl-C.

Here and in the commands, slow imports are inside functions, so that Ctrl-C is answered while they run.
"""

"""What the command lines in launch/ and tokenizer/ share: arguments, messages, exit codes, Ctrl-C.

Here and in the commands, slow imports are inside functions, so that Ctrl-C works while they run.
"""

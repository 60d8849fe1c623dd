"""One module a chapter: for each exercise a function of its name that runs an answer.

A driver takes the answer and the inputs of a case, plain data, and returns plain data:
what the answer gave, and what it cost. It runs beside the student's code, and knows no
expected value, nor whether an answer should refuse the inputs. Where that is tried it
says what was "raised", or "nothing".
"""

# SPDX-License-Identifier: Apache-2.0
"""OpenAI's HTTP, on the event loop of gRPC.

listener     the port: uvicorn, TLS
connection   what one connection may take: of bytes, of time
app          who may call what; errors become OpenAI's
exchange     one request and its response; a client that leaves
body         bytes to JSON, in slices
fields       which fields a body may have, and what they ask for
generation   prompts to the frontend, its output to the client
answers      how the output is worded, as a whole or in pieces
chat, completions    what a body says, and how the output is written
"""

"""The official OpenAI client: pip install openai."""

import os

import openai

base_url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
client = openai.OpenAI(base_url=base_url, api_key="none")
model = client.models.list().data[0].id
messages = [{"role": "user", "content": "Write a function that adds two numbers."}]
for chunk in client.chat.completions.create(
    model=model, messages=messages, max_tokens=60, stream=True
):
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print(f"\nmodel: {model}")

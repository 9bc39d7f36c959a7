"""ChatGLM3 on transformers' native Glm: conversion, prompt ids, and a LangChain chat model; no remote code."""

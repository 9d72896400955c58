"""From the research release to the Hub: conversion and upload."""

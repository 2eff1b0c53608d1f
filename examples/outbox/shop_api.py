"""The shop: FastAPI and SQLAlchemy. An order and its event commit together, and so does what the warehouse answers."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator
from typing import Annotated

import uvicorn
from fastapi import Body, FastAPI, HTTPException
from sqlalchemy import update
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from polybus import Bus, Event
from polybus.outbox import Inbox, Outbox


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    order_id: Mapped[str] = mapped_column(primary_key=True)
    reserved: Mapped[int] = mapped_column(default=0)
    """How many times the warehouse's answer took effect: once, if all is well."""


class Suppressed(Base):
    """Deliveries that the inbox kept from taking effect again."""

    __tablename__ = "suppressed"

    id: Mapped[int] = mapped_column(primary_key=True)
    event_id: Mapped[str]


engine = create_async_engine(os.environ["SHOP_DB"].replace("postgresql://", "postgresql+asyncpg://"), pool_size=16)
sessions = async_sessionmaker(engine)
bus = Bus(os.environ["BUS"], service="shop", lease=3.0)
outbox, inbox = Outbox(), Inbox()


@contextlib.asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with bus:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/orders", status_code=201)
async def place(order_id: Annotated[str, Body(embed=True)]) -> dict[str, str]:
    """Take an order. While Redis is down this works as ever: the event waits in the outbox."""
    event = Event.create("order.placed", {"orderId": order_id}, partition_key=order_id)
    async with sessions.begin() as session:
        session.add(Order(order_id=order_id))
        await outbox.store_async(event, session=session)
        if order_id.endswith("7"):  # the card is refused: neither the row nor the event may be seen by anybody
            raise HTTPException(402)
    return {"status": "placed"}


@bus.on("stock.reserved", concurrency=8)
async def reserved(event: Event) -> None:
    """Note the answer, once, however often it is delivered."""
    async with sessions.begin() as session, inbox.once(session, event, consumer="shop") as first:
        if first:
            change = update(Order).where(Order.order_id == event.payload["orderId"])
            await session.execute(change.values(reserved=Order.reserved + 1))
        else:
            session.add(Suppressed(event_id=event.meta.id))


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        server.run([listener])
    sys.exit(0)

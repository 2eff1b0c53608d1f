-- What `prisma migrate deploy` would make of schema.prisma; it is not used here, because it downloads an engine.
CREATE TABLE reservations (id SERIAL PRIMARY KEY, order_id TEXT NOT NULL, parcels INTEGER NOT NULL);
CREATE TABLE suppressed (id SERIAL PRIMARY KEY, event_id TEXT NOT NULL);
